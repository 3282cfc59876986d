"""Database servers of a test's own, which it may kill and start again.

Programs are looked for on this machine; see ``services`` for what happens where there is none.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import redis
from services import missing

#: Seconds until a server must be there, also on a machine that is busy.
PATIENCE = 60.0


class PrivateServer:
    """A server on a free port, with its data in a directory of its own.

    :cvar user: who runs it where the tests run as root, which some servers refuse.
    """

    user: str | None = None

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tuswsgi-"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        if self._account:
            shutil.chown(self.directory, self._account)
        self.prepare()
        self.start()

    @property
    def dsn(self) -> str:
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what must be there before the first start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until somebody answers."""
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.directory, user=self._account
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def restart(self) -> None:
        """Kill it without a warning, and start it again with what it has on disk."""
        self.kill()
        self.start()

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(self.death)
        self._process.wait(PATIENCE)

    def remove(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    #: What ends it at once, without a word to its clients or its disk.
    death = signal.SIGKILL

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def run(self, *command: str) -> None:
        """Run a program of the server's to its end."""
        subprocess.run(
            command, check=True, capture_output=True, cwd=self.directory, user=self._account
        )

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def _account(self) -> str | None:
        return self.user if os.getuid() == 0 else None


class PrivateRedis(PrivateServer):
    """Redis that writes every change to its file before it answers.

    :param options: of its own, as on a command line.
    """

    def __init__(self, *options: str) -> None:
        self.options = options
        super().__init__()

    @property
    def dsn(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [
            *(program("redis-server"), "--bind", "127.0.0.1", "--port", str(self.port)),
            *("--dir", str(self.directory), "--appendonly", "yes", "--save", ""),
            *self.options,
        ]


class PrivateSentinel(PrivateServer):
    """A Sentinel that decides alone who is the master of the service `tuswsgi`.

    :param master: the port of the first one.
    """

    def __init__(self, master: int) -> None:
        self._master = master
        super().__init__()

    def prepare(self) -> None:
        (self.directory / "sentinel.conf").write_text(
            f"port {self.port}\ndir {self.directory}\n"
            f"sentinel monitor tuswsgi 127.0.0.1 {self._master} 1\n"
            "sentinel down-after-milliseconds tuswsgi 500\n"
            "sentinel failover-timeout tuswsgi 2000\n"
        )

    def command(self) -> list[str]:
        return [*program("redis-server").split(), "sentinel.conf", "--sentinel"]

    @property
    def knows_replicas(self) -> int:
        with redis.Redis(port=self.port) as client:
            return int(client.sentinel_master("tuswsgi")["num-slaves"])

    def watch(self, master: int) -> None:
        """Take another server for the master from now on."""
        with redis.Redis(port=self.port) as client:
            client.sentinel_remove("tuswsgi")
            client.sentinel_monitor("tuswsgi", "127.0.0.1", master, 1)


class PrivateEtcd(PrivateServer):
    @property
    def dsn(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [
            *(program("etcd"), "--data-dir", str(self.directory / "data")),
            *("--listen-client-urls", self.dsn, "--advertise-client-urls", self.dsn),
            # It is alone, and nobody asks for this port.
            *("--listen-peer-urls", "http://127.0.0.1:0"),
        ]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.dsn}/health", timeout=1) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False


class PrivatePostgres(PrivateServer):
    user = "postgres"
    #: Without the grace for clients and without a checkpoint, but all of its processes end,
    #: or the next start finds their memory in use.
    death = signal.SIGQUIT

    @property
    def dsn(self) -> str:
        return f"postgres://tuswsgi@127.0.0.1:{self.port}/postgres"

    def prepare(self) -> None:
        data = str(self.directory / "data")
        self.run(
            *(postgres_program("initdb"), "-D", data, "-U", "tuswsgi", "--auth", "trust"),
            *("--no-sync", "--encoding", "UTF8", "--locale", "C"),
        )

    def command(self) -> list[str]:
        return [
            *(postgres_program("postgres"), "-D", str(self.directory / "data")),
            *("-p", str(self.port), "-k", str(self.directory)),
        ]

    def _answers(self) -> bool:
        command = [postgres_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0


class PrivateMariaDb(PrivateServer):
    user = "mysql"

    @property
    def dsn(self) -> str:
        return f"mysql://tuswsgi:secret@127.0.0.1:{self.port}/tuswsgi"

    @property
    def _data(self) -> str:
        return f"--datadir={self.directory / 'data'}"

    def prepare(self) -> None:
        init = self.directory / "init.sql"
        init.write_text(
            "CREATE DATABASE IF NOT EXISTS tuswsgi;\n"
            "CREATE USER IF NOT EXISTS tuswsgi@'%' IDENTIFIED BY 'secret';\n"
            "GRANT ALL ON tuswsgi.* TO tuswsgi@'%';\n"
        )
        init.chmod(0o644)
        self.run(
            *(program("mariadb-install-db"), "--no-defaults", self._data, "--skip-test-db"),
            "--auth-root-authentication-method=normal",
        )

    def command(self) -> list[str]:
        return [
            *(program("mariadbd"), "--no-defaults", self._data, f"--port={self.port}"),
            *("--bind-address=127.0.0.1", f"--socket={self.directory / 'socket'}"),
            f"--init-file={self.directory / 'init.sql'}",
        ]


def program(name: str) -> str:
    """Return the path of a server's program; the test is skipped where there is none."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    return shutil.which(name, path=path) or missing(f"There is no {name} on this machine.")


def postgres_program(name: str) -> str:
    """Return the path of a program of PostgreSQL's, which Debian keeps off the PATH."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else program(name)
