"""Locks for all processes of one host, in files.

A waiter sends a release request to the sockets of all processes, since the kernel does not tell
which one holds a lock.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tuswsgi.core.errors import (
    LockLost,
    StorageFull,
    Unavailable,
    UploadInterrupted,
    is_temporary,
    startup_error,
)
from tuswsgi.core.paths import make_directory, why_unwritable
from tuswsgi.core.process import PerProcess, run_in_thread
from tuswsgi.lockers.base import Locker, ReleaseRequest, request_release
from tuswsgi.lockers.lock_files import FileLock, LockFiles, may_create
from tuswsgi.lockers.lock_sockets import BOOT_ID, SocketDirectory

logger = logging.getLogger(__name__)

#: Seconds between checks that the directory still exists.
_CHECK_INTERVAL = 1.0


@dataclass(frozen=True, eq=False)
class Held:
    """A lock that is held, and the callback of its holder.

    :ivar since: nanoseconds on the monotonic clock, which all processes of a host share.
    """

    lock: FileLock
    on_release_request: ReleaseRequest | None
    since: int


class FileLocker(Locker[Held]):
    """Exclusive locks among all processes that use the same directory.

    :param directory: for the lock files and sockets, on a local file system.
    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    """

    def __init__(self, directory: Path, lock_timeout: float = 20.0) -> None:
        super().__init__(lock_timeout)
        self.directory = Path(directory).absolute()
        self._listener: PerProcess[Listener] = PerProcess(lambda: Listener(self.directory))
        # A forked child needs its own: a lock belongs to all who share an open file.
        self._files: PerProcess[LockFiles] = PerProcess(lambda: LockFiles(self.directory))

    @property
    def scope(self) -> str | None:
        """A name for the directory on this host until it boots again, the same for all paths to
        it; ``None`` if the kernel gives no such name.
        """
        try:
            found = self.directory.stat()
        except OSError:
            return None
        return f"{BOOT_ID}-{found.st_dev:x}-{found.st_ino:x}" if BOOT_ID else None

    def identify(self, held: Held) -> str | None:
        """Return a name for the lock's file, on this host until it boots again.

        It contains the boot id, because other hosts may see the file without seeing our locks,
        and the time when the file was created, because a file that replaces a removed one may
        get the same inode. Nothing writes to the file, so the time does not change.
        """
        if not BOOT_ID:
            return None
        found = os.fstat(held.lock.fd)
        return f"{BOOT_ID}-{found.st_dev:x}-{found.st_ino:x}-{found.st_mtime_ns:x}"

    def prepare(self) -> None:
        try:
            make_directory(self.directory)
            lock = self._files.get().try_lock("probe")
            if lock is not None:
                self._files.get().unlock(lock)
            sockets = SocketDirectory(self.directory)
            sockets.remove_dead()
            sockets.close()
        except OSError as error:
            raise startup_error(
                f"The directory {self.directory} cannot be used for locks: {error}", error
            ) from error

    def check(self) -> None:
        error = run_in_thread(why_unwritable, self.directory)
        if isinstance(error, FileNotFoundError) and may_create(self.directory):
            make_directory(self.directory)
        elif error is not None:
            raise Unavailable from error

    def close(self) -> None:
        listener = self._listener.pop()
        if listener is not None:
            listener.close()
        files = self._files.pop()
        if files is not None:
            files.close()

    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> Held | None:
        try:
            lock = self._files.get().try_lock(id)
            if lock is None:
                return None
            held = Held(lock, on_release_request, time.monotonic_ns())
            if on_release_request is not None:
                try:
                    self._listener.get().add(id, held)
                except BaseException:
                    self._files.get().unlock(lock)
                    raise
            return held
        except OSError as error:
            logger.error("Cannot lock %s: %s", id, error, exc_info=not is_temporary(error))
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (StorageFull if full else Unavailable) from error

    def _release(self, id: str, held: Held) -> None:
        if held.on_release_request is not None:
            self._listener.get().remove(id, held)
        self._files.get().unlock(held.lock)

    def _request_release(self, id: str) -> None:
        self._listener.get().broadcast(id)


class Listener:
    """The socket of one process, and the thread that receives release requests from it.

    A request says when it was sent, so that a late one does not reach a later holder.

    :param directory: where the socket is created.
    """

    def __init__(self, directory: Path) -> None:
        self._pid = os.getpid()
        self._holders: dict[str, Held] = {}
        self._directory = directory
        self._name = ""
        self._open()
        self._checked_at = time.monotonic()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def add(self, id: str, held: Held) -> None:
        """Pass requests for `id` to the holder from now on."""
        if self._thread is None:
            self._start()
        self._holders[id] = held

    def remove(self, id: str, held: Held) -> None:
        """Drop requests for `id`: the lock is about to be released."""
        if self._holders.get(id) is held:
            del self._holders[id]

    def broadcast(self, id: str) -> None:
        """Send a release request to all processes, without waiting."""
        if self._thread is None:
            self._check_files()
        message = f"{time.monotonic_ns()} {id}".encode()
        for name in self._sockets.names():
            try:
                self._sockets.send(name, message)
            except OSError:
                pass  # the process is dead, or busy: the waiter sends more requests

    def close(self) -> None:
        """End the thread and remove the socket."""
        self._closing = True
        try:
            self._sockets.send(self._name, b"")
        except OSError:
            pass  # a full queue wakes the thread as well
        self._sockets.path(self._name).unlink(missing_ok=True)
        if self._thread is None:
            self._dispose()
        else:
            self._thread.join(1.0)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                # Under gevent this is a greenlet, and start() switches.
                self._thread = threading.Thread(
                    target=self._listen, name="tuswsgi-lock-listener", daemon=True
                )
                self._thread.start()

    def _open(self) -> None:
        make_directory(self._directory)
        self._sockets = SocketDirectory(self._directory)
        self._name = self._name or self._sockets.new_name()
        self._inbox = self._sockets.bind(self._name)
        self._inbox.settimeout(_CHECK_INTERVAL)

    def _listen(self) -> None:
        # A greenlet lives on in a forked child, where the socket is still the parent's.
        while not self._closing and os.getpid() == self._pid:
            try:
                message = self._inbox.recv(512)
                if os.getpid() == self._pid:
                    self._deliver(message)
                    self._check_files()
            except TimeoutError:
                self._check_files()
            except OSError:
                logger.exception("Cannot receive requests to release locks")
                time.sleep(0.1)
        self._dispose()

    def _check_files(self) -> None:
        """Find out, about once a second, whether files of this process were removed."""
        now = time.monotonic()
        is_ours = not self._closing and os.getpid() == self._pid
        if not is_ours or now - self._checked_at < _CHECK_INTERVAL / 2:
            return
        self._checked_at = now
        for id, held in list(self._holders.items()):
            if held.lock.is_lost():
                logger.error("The lock of %s is lost: its file was removed", id)
                request_release(held.on_release_request, LockLost())
        path = self._sockets.path(self._name)
        if not path.is_socket() and may_create(self._directory):
            logger.error("%s was removed; it is created again", path)
            self._dispose()
            self._open()

    def _deliver(self, message: bytes) -> None:
        sent, _, id = message.decode("ascii", "replace").partition(" ")
        held = self._holders.get(id)
        if held is not None and sent.isdigit() and int(sent) >= held.since:
            request_release(held.on_release_request, UploadInterrupted())

    def _dispose(self) -> None:
        self._inbox.close()
        self._sockets.close()
