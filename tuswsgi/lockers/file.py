"""Locks for all processes of one host, kept as flock(2) locks on files.

The kernel releases such a lock when its holder dies. This file owns the lock files and
the sockets beside them, by which a waiter asks the present holder to let go: a lock file
names the holder's socket and a token of this one acquisition. It does not know what is
locked, and waiting is the business of the base class.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tuswsgi.errors import (
    ConfigurationError,
    StorageFull,
    Unavailable,
    UploadInterrupted,
    UploadNotFound,
)
from tuswsgi.lockers.base import Locker, ReleaseRequest, ask_to_release
from tuswsgi.paths import inside
from tuswsgi.process import PerProcess

logger = logging.getLogger(__name__)

#: The longest address that is bound as it is; the kernel takes 107 bytes.
_LONGEST_ADDRESS = 100

#: The first line of a lock file: the name of the holder's socket and the token.
_LINE = re.compile(rb"([0-9]+-[0-9a-f]{8}\.sock) ([0-9a-f]{16})\n")


@dataclass(frozen=True)
class Held:
    """One acquisition: the locked file and the token by which its holder is asked, if it
    can be asked at all.
    """

    fd: int
    path: Path
    token: bytes = b""
    mailbox: Mailbox | None = None


class FileLocker(Locker[Held]):
    """Exclusive locks among all processes that use the same directory.

    flock belongs to the open file, so it excludes the greenlets of one process as well;
    lockf does not.

    :param directory: where the lock files and sockets are, on a local file system.
    :param timeout: how long ``lock`` waits for a holder, in seconds.
    """

    def __init__(self, directory: Path, timeout: float = 20.0) -> None:
        super().__init__(timeout)
        self.directory = Path(directory).absolute()
        self._mailbox: PerProcess[Mailbox] = PerProcess(lambda: Mailbox(self.directory))

    def prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _probe(self.directory)
            _remove_leftovers(self.directory)
        except OSError as error:
            raise ConfigurationError(
                f"The directory {self.directory} cannot be used for locks: {error}"
            ) from error

    def close(self) -> None:
        mailbox = self._mailbox.pop()
        if mailbox is not None:
            mailbox.close()

    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> Held | None:
        path = self._path(id)
        try:
            fd = _open_locked(path)
            if fd is None:
                return None
            if on_release_request is None:
                return Held(fd, path)
            try:
                return self._announce(fd, path, on_release_request)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            logger.exception("Cannot lock %s", path)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (StorageFull if full else Unavailable) from error

    def _path(self, id: str) -> Path:
        if "/" in id:
            raise UploadNotFound
        return inside(self.directory, f"{id}.lock")

    def _announce(self, fd: int, path: Path, on_release_request: ReleaseRequest) -> Held:
        mailbox = self._mailbox.get()
        token = mailbox.expect(on_release_request)
        try:
            # Only the first line counts: what a dead holder's longer one left is no harm.
            os.pwrite(fd, mailbox.name.encode() + b" " + token + b"\n", 0)
        except OSError:
            # The flock excludes without the line: better a holder that cannot be asked
            # than no lock at all on a full disk.
            logger.warning("Cannot write %s: its holder cannot be asked to let go", path)
        return Held(fd, path, token, mailbox)

    def _release(self, id: str, held: Held) -> None:
        if held.mailbox is not None:
            held.mailbox.forget(held.token)
        try:
            # Whoever unlinks must hold the lock of the file that is there now. Anything
            # else would remove the file of a later holder.
            if _is_current(held.fd, held.path):
                held.path.unlink()
        except OSError:
            logger.warning("Cannot remove %s", held.path, exc_info=True)
        finally:
            os.close(held.fd)

    def _request_release(self, id: str) -> None:
        try:
            line = _LINE.match(self._path(id).read_bytes())
            if line is not None:
                self._mailbox.get().send(line[1].decode(), line[2])
        except OSError:
            # No file: the lock is free. No socket behind the name: the holder died, and
            # the lock is free too. A full queue: the base class asks again.
            pass


class Mailbox:
    """The socket of one process, and the watcher that reads release requests from it.

    :param directory: where the socket is made.
    """

    def __init__(self, directory: Path) -> None:
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self._pid = os.getpid()
        self._callbacks: dict[bytes, ReleaseRequest] = {}
        self._post = Post(directory)
        self._inbox = self._post.bind(self.name)
        self._closing = False
        self._watcher: threading.Thread | None = None
        self._starting = threading.Lock()

    def expect(self, on_release_request: ReleaseRequest) -> bytes:
        """Return a new token; whoever sends it calls `on_release_request`."""
        if self._watcher is None:
            self._start()
        token = secrets.token_hex(8).encode()
        self._callbacks[token] = on_release_request
        return token

    def forget(self, token: bytes) -> None:
        """The lock was released: requests that are under way are for nobody."""
        self._callbacks.pop(token, None)

    def send(self, name: str, token: bytes) -> None:
        """Send a release request without waiting.

        :raises OSError: if it cannot be delivered now.
        """
        self._post.send(name, token)

    def close(self) -> None:
        """End the watcher and remove the socket."""
        self._closing = True
        try:
            self.send(self.name, b"")
        except OSError:
            pass  # a full queue wakes the watcher as well
        self._post.path(self.name).unlink(missing_ok=True)
        if self._watcher is None:
            self._dispose()
        else:
            self._watcher.join(1.0)

    def _start(self) -> None:
        with self._starting:
            if self._watcher is None:
                # Under gevent this is a greenlet, and start() switches.
                self._watcher = threading.Thread(
                    target=self._watch, name="tuswsgi-lock-watcher", daemon=True
                )
                self._watcher.start()

    def _watch(self) -> None:
        # A greenlet lives on in a forked child, where the socket is still the parent's.
        while not self._closing and os.getpid() == self._pid:
            try:
                token = self._inbox.recv(64)
            except OSError:
                logger.exception("Cannot receive requests to release locks")
                time.sleep(0.1)
                continue
            callback = self._callbacks.get(token)
            if callback is not None and os.getpid() == self._pid:
                ask_to_release(callback, UploadInterrupted())
        self._dispose()

    def _dispose(self) -> None:
        self._inbox.close()
        self._post.close()


class Post:
    """Unix datagram sockets by name in a directory, however long its path is."""

    def __init__(self, directory: Path) -> None:
        self._directory = self._prefix = directory
        self._fd: int | None = None
        if len(os.fsencode(self.path(f"{2**32}-{0:08x}.sock"))) > _LONGEST_ADDRESS:
            self._shorten()
        self._outbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._outbox.setblocking(False)

    def _shorten(self) -> None:
        if Path("/proc/self/fd").is_dir():
            self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            self._prefix = Path(f"/proc/self/fd/{self._fd}")
            return
        digest = hashlib.sha256(os.fsencode(self._directory)).hexdigest()
        self._directory = self._prefix = Path(tempfile.gettempdir()) / f"tuswsgi-{digest[:16]}"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._directory.stat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "Somebody else's directory", str(self._directory))

    def path(self, name: str) -> Path:
        """Where the socket `name` is found."""
        return self._directory / name

    def names(self) -> list[str]:
        """Return the names of all sockets, also of processes that are dead."""
        return [path.name for path in self._directory.glob("*.sock")]

    def bind(self, name: str) -> socket.socket:
        inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        inbox.bind(str(self._prefix / name))
        return inbox

    def send(self, name: str, message: bytes) -> None:
        self._outbox.sendto(message, str(self._prefix / name))

    def close(self) -> None:
        self._outbox.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _open_locked(path: Path) -> int | None:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        # The holder removed the file between our open and our flock.
        os.close(fd)


def _is_current(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _probe(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # somebody else's lock: it works
    finally:
        os.close(fd)


def _remove_leftovers(directory: Path) -> None:
    """Remove what processes that died left behind: their sockets and lock files."""
    post = Post(directory)
    for name in post.names():
        try:
            post.send(name, b"")
        except ConnectionRefusedError:
            post.path(name).unlink(missing_ok=True)
        except OSError:
            pass  # alive but busy, or gone already
    post.close()
    for path in directory.glob("*.lock"):
        try:
            # Only what is surely ours: somebody may keep other files here.
            if _LINE.match(path.read_bytes()) and (fd := _open_locked(path)) is not None:
                path.unlink()
                os.close(fd)
        except OSError:
            pass  # gone already, or not ours
