"""Starts servers in processes of their own and ends them, whatever happened in between."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.client import PATIENCE, Client, Connection, Origin, wait_until

#: How ``tuswsgi serve`` says that it can be reached, and how other servers do.
READY = (
    r"You can now upload files (?:to: https?://([\d.]+):(\d+)/"
    r"|through the unix socket: (?P<unix>\S+))"
)
OTHERS_READY = r"(?:Listening at:|Running on) https?://([\d.]+):(\d+)"

SERVE = (sys.executable, "-m", "tuswsgi", "serve", "--host", "127.0.0.1", "--port", "0")


class Server:
    """A server process with its workers, and its log.

    :param ready: what it says when it can be reached.
    :param tls: how clients check its certificate.
    """

    def __init__(
        self,
        command: Sequence[str],
        data_dir: Path,
        environ: Mapping[str, str] | None = None,
        *,
        ready: str = READY,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.data_dir = data_dir
        #: What the server is expected to complain about with a traceback.
        self.expected: str | None = None
        self._command = command
        self._environ = environ or {}
        self._tls = tls
        self._ready = ready
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._has_ended = True

    def start(self) -> None:
        """Start it and wait until it can be reached."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TUSWSGI_", "RUSTUS_"))
        }
        seen = len(self._lines)
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**inherited, "PYTHONUNBUFFERED": "1", **self._environ},
        )
        with self._news:
            self._has_ended = False
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        match = self.wait_for(self._ready, seen)
        address = match.groupdict().get("unix") or (match[1], int(match[2]))
        self.client = Client(Origin(address, self._tls))

    def kill(self) -> None:
        """SIGKILL the master and its workers, and wait until all of them are dead."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(PATIENCE)
        # The log ends when nobody is left who could write to it.
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive()
        self._process = None

    def kill_worker(self) -> None:
        """SIGKILL one worker; the master makes another one."""

        def strike() -> bool:
            workers = self.workers()
            random.shuffle(workers)
            for worker in workers:
                try:
                    os.kill(worker, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended a moment ago, as workers do after a reload
                return True
            return False

        wait_until(strike, "a worker to kill")

    def restart(self) -> None:
        self.kill()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        assert self._process is not None
        self._process.send_signal(number)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the master and its workers at once, as a terminal does."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until the master has ended and return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def wait_for(self, pattern: str, start: int = 0) -> re.Match[str]:
        """Wait for a line in the log, after the first `start` lines."""
        regex = re.compile(pattern)
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(filter(None, map(regex.search, self._lines[start:])))
            return bool(found) or self._has_ended

        with self._news:
            self._news.wait_for(look, PATIENCE)
        assert found, f"the server did not say {pattern!r}:\n{self.log}"
        return found[0]

    @property
    def log_length(self) -> int:
        """How many lines there are, for ``wait_for``."""
        return len(self._lines)

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        assert self._process is not None
        parent = str(self._process.pid)
        return [
            int(stat.parent.name)
            for stat in Path("/proc").glob("[0-9]*/stat")
            if _fields(stat)[1:2] == [parent]
        ]

    def worker_of(self, connection: Connection) -> int:
        """Return the process id of the worker that accepts a connection."""
        found: list[int] = []

        def look() -> bool:
            found.extend(self._workers_with(_inode_of_peer(connection)))
            return bool(found)

        wait_until(look, "a worker that accepts the connection")
        return found[0]

    def holds(self, connection: Connection) -> bool:
        """Return whether a connection is still open on the server's side."""
        return _inode_of_peer(connection) not in (None, "0")

    def _workers_with(self, inode: str | None) -> Iterator[int]:
        for worker in self.workers():
            try:
                fds = list(Path(f"/proc/{worker}/fd").iterdir())
            except OSError:
                continue  # it ended a moment ago
            for fd in fds:
                try:
                    if os.readlink(fd) == f"socket:[{inode}]":
                        yield worker
                except OSError:
                    pass  # closed a moment ago

    def highest_memory(self) -> int:
        """Return the most bytes that the workers ever had in memory, together."""
        texts = (Path(f"/proc/{worker}/status").read_text() for worker in self.workers())
        peaks = (re.search(r"VmHWM:\s*(\d+) kB", text) for text in texts)
        return sum(int(peak[1]) * 1024 for peak in peaks if peak)

    def file(self, path: str) -> Path:
        """Return where the bytes of an upload are."""
        return self.data_dir / path.rpartition("/")[2]

    def stored(self, path: str) -> int:
        """Return how many bytes of an upload are on disk, without asking the server."""
        return self.file(path).stat().st_size

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            # The log of one that was stopped may end after the next one was started.
            if process is self._process:
                self._has_ended = True
            self._news.notify_all()


def _fields(stat: Path) -> list[str]:
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _inode_of_peer(connection: Connection) -> str | None:
    (_, client), (_, server) = connection.sock.getsockname(), connection.sock.getpeername()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(field.partition(":")[2], 16) for field in fields[1:3])
        if (local, remote) == (server, client):
            return fields[9]
    return None


def app_server(module: str, data_dir: Path, *flags: str, **options: str) -> Server:
    """Return a server of one worker, with our settings, for an application beside these tests.

    :param flags: gunicorn's, which win.
    :param options: ours.
    """
    root = Path(__file__).parent.parent.parent
    environ = {
        "TUSWSGI_DATA_DIR": str(data_dir),
        "TUSWSGI_HOST": "127.0.0.1",
        "TUSWSGI_PORT": "0",
        "TUSWSGI_WORKERS": "1",
        "PYTHONPATH": str(root),
        **{f"TUSWSGI_{name.upper()}": value for name, value in options.items()},
    }
    command = [
        *(sys.executable, "-m", "gunicorn", "-c", str(root / "conf" / "gunicorn.conf.py")),
        *("--chdir", str(root / "tests"), *flags, f"e2e.{module}:application"),
    ]
    return Server(command, data_dir, environ)


def free_port() -> int:
    """Return a port for a server that is to have the same one after a restart."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Run a server; at the end it must not have failed in a way that nobody expected."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
    _check_log(server.log, server.expected)


def _check_log(log: str, expected: str | None) -> None:
    if expected is not None:
        assert expected in log
        return
    assert "Traceback" not in log, log
    assert "[CRITICAL]" not in log, log


@pytest.fixture(autouse=True)
def _random_seed() -> None:
    """Make what is random the same again: a failure shows the seed."""
    seed = int(os.environ.get("TUSWSGI_TEST_SEED") or random.randrange(2**32))
    print(f"TUSWSGI_TEST_SEED={seed}")
    random.seed(seed)


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts ``tuswsgi serve`` with flags."""
    servers = []

    def start(*flags: str, workers: int = 2, **options: object) -> Server:
        data_dir = tmp_path / "data"
        command = [*SERVE, "--data-dir", str(data_dir), "--workers", str(workers), *flags]
        context = running(Server(command, data_dir, **options))  # type: ignore[arg-type]
        server = context.__enter__()
        servers.append(context)
        return server

    yield start
    for context in reversed(servers):
        context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def _shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("shared") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "2"]
    with running(Server(command, data_dir)) as server:
        yield server


@pytest.fixture
def server(_shared_server: Server) -> Iterator[Server]:
    """A server in its default configuration with two workers, shared by many tests.

    Tests must leave it running.
    """
    start = len(_shared_server.log)
    yield _shared_server
    _check_log(_shared_server.log[start:], None)


@pytest.fixture
def client(server: Server) -> Client:
    """A client of the shared server."""
    return server.client


@pytest.fixture(scope="session")
def tls_flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], ssl.SSLContext]:
    """Return flags for serving with TLS, and how clients check the certificate."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    flags = ["--certfile", str(certificate), "--keyfile", str(key)]
    return flags, ssl.create_default_context(cafile=str(certificate))
