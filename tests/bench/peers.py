"""The servers that are compared: how each is installed, started and stopped.

A peer is installed once, by its own package manager, into a cache. It is started in a fresh
directory on a free port of the loopback interface, and stopped with all its children.
Whatever cannot be installed or started raises ``Unavailable`` and is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.bench import load
from tests.bench.load import Upload
from tests.bench.measure import Meter, cpu_seconds, memory
from tests.bench.wire import Failed, Target, Unsupported

#: The name of ours in all tables.
OURS = "tuswsgi"

_ROOT = Path(__file__).resolve().parents[2]
_SERVERS = Path(__file__).resolve().parent / "servers"
_HOST = "127.0.0.1"
_START = 30.0
_STOP = 15.0
_QUIET = 0.3
_INSTALL = 600.0


class Unavailable(Exception):
    """A peer cannot be installed or started here."""


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, for TLS."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Launch:
    """How a server is to be started."""

    directory: Path
    workers: int
    certificate: Certificate | None
    port: int = 0


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    target: Target
    pids: tuple[int, ...] = ()
    directory: Path | None = None

    def meter(self) -> Meter:
        """Return what measures a load on it."""
        return Meter(self.pids)

    def memory(self) -> int:
        """Return the bytes of memory of all its processes."""
        return memory(self.pids)

    def extensions(self) -> set[str]:
        """Return the extensions that it says it has."""
        return set(load.options(self.target).header("Tus-Extension").replace(" ", "").split(","))

    def evict(self, uploads: Sequence[Upload]) -> None:
        """Make the next reads of uploads come from the disk.

        :raises Unsupported: if the server's directory is unknown.
        """
        for path in self._files(uploads):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def release(self, uploads: Sequence[Upload]) -> None:
        """Give back the disk space of uploads.

        Files are truncated, for to remove them makes the creation of the next ones slower on
        some file systems. A server whose directory is unknown is asked to remove them.
        """
        if self.directory is None:
            for upload in uploads:
                load.delete(self.target, upload)
            return
        for path in self._files(uploads):
            os.truncate(path, 0)

    def _files(self, uploads: Sequence[Upload]) -> Iterator[Path]:
        if self.directory is None:
            raise Unsupported("Its directory is unknown.")
        for upload in uploads:
            yield from self.directory.rglob(upload.path.rpartition("/")[2])


class Peer(ABC):
    """A server that can be started."""

    name: str
    #: What it is and what it runs on.
    version: str

    @abstractmethod
    def start(self, launch: Launch) -> AbstractContextManager[Server]:
        """Start it, and stop it in the end."""


@dataclass(frozen=True)
class LocalPeer(Peer):
    """A server that the benchmark starts itself."""

    name: str
    version: str
    command: Callable[[Launch], list[str]]
    path: str = "/files"
    tls: bool = True

    @contextmanager
    def start(self, launch: Launch) -> Iterator[Server]:
        if launch.certificate and not self.tls:
            raise Unsupported("It has no TLS.")
        launch.directory.mkdir(parents=True)
        launch = Launch(launch.directory, launch.workers, launch.certificate, _free_port())
        scheme = "https" if launch.certificate else "http"
        target = Target(scheme, _HOST, launch.port, self.path)
        with _process(self.command(launch), launch.directory) as process:
            _await(target, process, launch.directory)
            _settle(process.pid)
            yield Server(target, (process.pid,), launch.directory)


@dataclass(frozen=True)
class ExternalPeer(Peer):
    """A server that was started already, at a URL for http, for https or both."""

    name: str
    targets: tuple[Target, ...]
    pids: tuple[int, ...]
    version: str = "started elsewhere"

    @contextmanager
    def start(self, launch: Launch) -> Iterator[Server]:
        scheme = "https" if launch.certificate else "http"
        target = next((target for target in self.targets if target.scheme == scheme), None)
        if target is None:
            raise Unsupported(f"It has no URL of {scheme}.")
        yield Server(target, self.pids)


def ours(cache: Path) -> Peer:
    """Return this checkout's server, with its default configuration."""

    def command(launch: Launch) -> list[str]:
        command = ["env", f"PYTHONPATH={_ROOT}", sys.executable, "-m", "tuswsgi", "serve"]
        command += ["--host", _HOST, "--port", str(launch.port)]
        command += ["--workers", str(launch.workers)]
        command += ["--data-dir", str(launch.directory / "data")]
        if launch.certificate:
            command += ["--certfile", str(launch.certificate.certificate)]
            command += ["--keyfile", str(launch.certificate.key)]
        return command

    python = ".".join(map(str, sys.version_info[:3]))
    runs_on = f"gunicorn {version('gunicorn')}, gevent {version('gevent')}, Python {python}"
    return LocalPeer(OURS, f"{version('tuswsgi-server')} ({runs_on})", command)


def tusd(cache: Path) -> Peer:
    """Return tusd with its file store and file locker, if it is installed."""
    program = shutil.which("tusd")
    if program is None:
        raise Unavailable("There is no tusd on the PATH.")

    def command(launch: Launch) -> list[str]:
        command = [program, "-host", _HOST, "-port", str(launch.port)]
        command += ["-base-path", "/files/", "-upload-dir", str(launch.directory / "data")]
        if launch.certificate:
            command += ["-tls-certificate", str(launch.certificate.certificate)]
            command += ["-tls-key", str(launch.certificate.key)]
        return command

    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    lines = (told.stdout + told.stderr).splitlines()
    number = next((line for line in lines if line.startswith("Version:")), "Version: unknown")
    return LocalPeer("tusd", number.partition(":")[2].strip(), command, path="/files/")


def tus_node(cache: Path) -> Peer:
    """Return @tus/server with @tus/file-store, installed by npm."""
    directory = cache / "node"
    package = directory / "node_modules" / "@tus" / "server" / "package.json"
    if not package.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(directory),
             "@tus/server", "@tus/file-store")  # fmt: skip
    # node looks for packages beside the script.
    script = shutil.copy(_SERVERS / "tus_node.mjs", directory)

    def command(launch: Launch) -> list[str]:
        data = launch.directory / "data"
        pair = launch.certificate
        files = [str(pair.certificate), str(pair.key)] if pair else []
        return ["node", str(script), str(data), str(launch.port), *files]

    node = _run("node", "--version").removeprefix("v")
    return LocalPeer("@tus/server", f"{_json_version(package)} (node {node})", command)


def tuspyserver(cache: Path) -> Peer:
    """Return tuspyserver, a FastAPI router, run by uvicorn; installed by pip."""
    python = _environment(cache / "tuspyserver", "tuspyserver", "uvicorn[standard]")

    def command(launch: Launch) -> list[str]:
        command = ["env", f"BENCH_DIRECTORY={launch.directory / 'data'}", python, "-m", "uvicorn"]
        command += ["--app-dir", str(_SERVERS), "fastapi_app:app"]
        command += ["--host", _HOST, "--port", str(launch.port)]
        command += ["--workers", str(launch.workers)]
        if launch.certificate:
            command += ["--ssl-certfile", str(launch.certificate.certificate)]
            command += ["--ssl-keyfile", str(launch.certificate.key)]
        return command

    versions = f"{_pip_version(python, 'tuspyserver')} (uvicorn {_pip_version(python, 'uvicorn')})"
    return LocalPeer("tuspyserver", versions, command, path="/files/")


def resumable_upload(cache: Path) -> Peer:
    """Return resumable-upload's own threaded server, installed by pip."""
    python = _environment(cache / "resumable-upload", "resumable-upload")

    def command(launch: Launch) -> list[str]:
        command = [python, "-m", "resumable_upload", "serve", "--enable-downloads"]
        command += ["--host", _HOST, "--port", str(launch.port)]
        command += ["--upload-dir", str(launch.directory / "data")]
        return [*command, "--db-path", str(launch.directory / "uploads.db")]

    name = "resumable-upload"
    return LocalPeer(name, _pip_version(python, name), command, tls=False)


#: By their names. Ours comes first.
PEERS: dict[str, Callable[[Path], Peer]] = {
    OURS: ours,
    "tusd": tusd,
    "@tus/server": tus_node,
    "tuspyserver": tuspyserver,
    "resumable-upload": resumable_upload,
}


def make_certificate(directory: Path) -> Certificate | None:
    """Return a new certificate, or None where there is no openssl."""
    pair = Certificate(directory / "certificate.pem", directory / "key.pem")
    try:
        _run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-keyout", str(pair.key), "-out", str(pair.certificate))  # fmt: skip
    except Unavailable:
        return None
    return pair


@contextmanager
def _process(command: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    # A session of its own: Ctrl-C is for the benchmark, which then stops the server.
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=_environ(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_STOP)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
    process.wait()


def _await(target: Target, process: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + _START
    while process.poll() is None and time.monotonic() < deadline:
        try:
            load.options(target)
            return
        except (OSError, Failed):
            time.sleep(0.05)
    lines = (directory / "log").read_text(errors="replace").strip().splitlines()
    raise Unavailable(f"It did not start: {lines[-1] if lines else 'it says nothing'}")


def _settle(pid: int) -> None:
    """Wait until a server has nothing to do: one that answers may not have all of its workers
    yet, and those that are there would get all connections.
    """
    deadline, before = time.monotonic() + _START, -1.0
    while (now := cpu_seconds((pid,))) > before and time.monotonic() < deadline:
        before = now
        time.sleep(_QUIET)


def _environ() -> dict[str, str]:
    """Return an environment that configures no server."""
    own = ("TUSWSGI_", "RUSTUS_", "PYTHON", "NODE_", "UVICORN_", "GUNICORN_", "WEB_CONCURRENCY")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _environment(directory: Path, *packages: str) -> str:
    """Return the Python of a virtual environment that has the packages."""
    python = directory / "bin" / "python"
    done = directory / "installed"
    if not done.exists():
        _run(sys.executable, "-m", "venv", "--clear", str(directory))
        _run(str(python), "-m", "pip", "install", "--quiet", *packages)
        done.touch()
    return str(python)


def _pip_version(python: str, package: str) -> str:
    return _run(python, "-c", f"import importlib.metadata as m; print(m.version('{package}'))")


def _json_version(package: Path) -> str:
    return str(json.loads(package.read_text())["version"])


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL, cwd=tempfile.gettempdir()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Unavailable(f"{' '.join(command[:3])} failed: {lines[-1] if lines else ''}")
    return done.stdout.strip()
