"""Locks for all processes of one host, kept by the kernel as locks on files.

The kernel releases such a lock when its holder dies. This file owns the lock files and
the sockets beside them, by which a waiter asks the present holder to let go. It does not
know what is locked, and waiting is the business of the base class.

A lock is one byte, found by hashing the id, of one of a few files that are always there.
A file per lock would be made and removed with every request, and a file system like ext4
gets slower and slower at that.

Somebody may remove the directory while locks are held, a cleaner of temporary files for one.
It is made again, and who holds a lock in a file that has no name any more is told within a
second that the lock is lost: others may have it in the file's successor.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# gevent's os.close looks for watchers of the descriptor, which a file has none of.
from posix import close
from typing import NamedTuple

from tuswsgi.core.errors import (
    LockLost,
    StorageFull,
    Unavailable,
    UploadInterrupted,
    UploadNotFound,
    may_pass,
    unusable,
)
from tuswsgi.core.paths import adopt, contained, make_directory, why_unwritable
from tuswsgi.core.process import PerProcess, run_in_thread
from tuswsgi.lockers.base import Locker, ReleaseRequest, ask_to_release

logger = logging.getLogger(__name__)

#: The longest address that is bound as it is; the kernel takes 107 bytes.
_LONGEST_ADDRESS = 100

#: How many files share the locks: the kernel looks through all locks of a file.
_FILES = 64

#: How many of each file stay open without a lock.
_MOST_FREE = 4

#: Seconds between two looks whether the directory is still there.
_LOOK = 1.0

#: Open file description locks: unlike those of lockf they exclude the greenlets of one
#: process, too. Linux has them; elsewhere a lock is a file after all, which stays.
_SET_LOCK: int | None = getattr(fcntl, "F_OFD_SETLK", None)

#: ``struct flock``: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def _name_of_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


#: The name of this host since it booted, empty where there is none.
_BOOT = _name_of_boot()

#: What the names of this host's sockets begin with.
_HOST = f"{_BOOT[:8]}-"


class Lock(NamedTuple):
    """A byte of an open file that is locked."""

    name: str
    fd: int
    place: int


@dataclass(frozen=True, eq=False)
class Held:
    """One acquisition: the lock, and who may be asked for it."""

    lock: Lock
    on_release_request: ReleaseRequest | None
    #: On the clock that all processes of a host share.
    since: int


class FileLocker(Locker[Held]):
    """Exclusive locks among all processes that use the same directory.

    :param directory: where the lock files and sockets are, on a local file system.
    :param timeout: how long ``lock`` waits for a holder, in seconds.
    """

    def __init__(self, directory: Path, timeout: float = 20.0) -> None:
        super().__init__(timeout)
        self.directory = Path(directory).absolute()
        self._mailbox: PerProcess[Mailbox] = PerProcess(lambda: Mailbox(self.directory))
        # A child has its own: a lock belongs to all who share an open file.
        self._files: PerProcess[LockFiles] = PerProcess(lambda: LockFiles(self.directory))

    @property
    def scope(self) -> str | None:
        """A name for the directory on this host until it boots again, whatever path it is seen
        by; ``None`` where there is no such name.
        """
        try:
            found = self.directory.stat()
        except OSError:
            return None
        return f"{_BOOT}-{found.st_dev:x}-{found.st_ino:x}" if _BOOT else None

    def identify(self, held: Held) -> str | None:
        """Return the name of a lock's file on this host until it boots again.

        Several hosts may see the file, and their kernels know nothing of each other's locks:
        hence the kernel's own name. The file may take the place of one that was removed while
        others had locks in it, and get its number: hence the time when it was made, which stays,
        for nobody writes to it.
        """
        if not _BOOT:
            return None
        found = os.fstat(held.lock.fd)
        return f"{_BOOT}-{found.st_dev:x}-{found.st_ino:x}-{found.st_mtime_ns:x}"

    def prepare(self) -> None:
        try:
            make_directory(self.directory)
            lock = self._files.get().try_lock("probe")
            if lock is not None:
                self._files.get().unlock(lock)
            _remove_leftovers(self.directory)
        except OSError as error:
            raise unusable(
                f"The directory {self.directory} cannot be used for locks: {error}", error
            ) from error

    def check(self) -> None:
        error = run_in_thread(why_unwritable, self.directory)
        if isinstance(error, FileNotFoundError) and _may_be_made_again(self.directory):
            make_directory(self.directory)
        elif error is not None:
            raise Unavailable from error

    def close(self) -> None:
        mailbox = self._mailbox.pop()
        if mailbox is not None:
            mailbox.close()
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
                    self._mailbox.get().expect(id, held)
                except BaseException:
                    self._files.get().unlock(lock)
                    raise
            return held
        except OSError as error:
            logger.error("Cannot lock %s: %s", id, error, exc_info=not may_pass(error))
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (StorageFull if full else Unavailable) from error

    def _release(self, id: str, held: Held) -> None:
        if held.on_release_request is not None:
            self._mailbox.get().forget(id, held)
        self._files.get().unlock(held.lock)

    def _request_release(self, id: str) -> None:
        # Nobody knows which process it is, but there are few on a host.
        self._mailbox.get().broadcast(id)


class LockFiles:
    """The lock files of one process.

    A file that has no lock stays open for the next one: to open it would cost more than
    to lock it. Each lock has an open file of its own, or greenlets would share locks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._free: dict[str, list[int]] = {}

    def try_lock(self, id: str) -> Lock | None:
        """Return the lock of `id`, ``None`` if another one has it."""
        if "/" in id:
            raise UploadNotFound
        name, place = _place(id)
        lock = Lock(name, self._take(name), place)
        try:
            if _SET_LOCK is not None:
                fcntl.fcntl(lock.fd, _SET_LOCK, _change(fcntl.F_WRLCK, place))
            else:
                fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._give_back(lock)
            return None
        except BaseException:
            close(lock.fd)
            raise
        return lock

    def unlock(self, lock: Lock) -> None:
        if _SET_LOCK is None:
            close(lock.fd)
            return
        try:
            fcntl.fcntl(lock.fd, _SET_LOCK, _change(fcntl.F_UNLCK, lock.place))
        except BaseException:
            close(lock.fd)
            raise
        self._give_back(lock)

    def close(self) -> None:
        while self._free:
            _, free = self._free.popitem()
            for fd in free:
                close(fd)

    def _take(self, name: str) -> int:
        try:
            fd = self._free[name].pop()
        except LookupError:
            return _open(self._directory, name)
        if os.fstat(fd).st_nlink:
            return fd
        # Somebody has removed the file: others would lock another one of that name.
        close(fd)
        return _open(self._directory, name)

    def _give_back(self, lock: Lock) -> None:
        free = self._free.setdefault(lock.name, [])
        if _SET_LOCK is not None and len(free) < _MOST_FREE:
            free.append(lock.fd)
        else:
            close(lock.fd)


def _change(kind: int, place: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)


class Mailbox:
    """The socket of one process, and the watcher that reads release requests from it.

    A request says when it was sent. It is for who held the lock then, so one that comes
    late does not meet a later holder.

    :param directory: where the socket is made.
    """

    def __init__(self, directory: Path) -> None:
        self.name = f"{_HOST}{os.getpid()}-{secrets.token_hex(4)}.sock"
        self._pid = os.getpid()
        self._holders: dict[str, Held] = {}
        self._directory = directory
        self._open()
        self._looked_at = time.monotonic()
        self._closing = False
        self._watcher: threading.Thread | None = None
        self._starting = threading.Lock()

    def expect(self, id: str, held: Held) -> None:
        """Take requests for the lock of `id` from now on."""
        if self._watcher is None:
            self._start()
        self._holders[id] = held

    def forget(self, id: str, held: Held) -> None:
        """The lock is about to be released: requests that are under way are for nobody."""
        if self._holders.get(id) is held:
            del self._holders[id]

    def broadcast(self, id: str) -> None:
        """Send a release request to all processes, without waiting."""
        if self._watcher is None:
            self._look()
        message = f"{time.monotonic_ns()} {id}".encode()
        for name in self._post.names():
            try:
                self._post.send(name, message)
            except OSError:
                pass  # the process is dead, or busy: the base class asks again

    def close(self) -> None:
        """End the watcher and remove the socket."""
        self._closing = True
        try:
            self._post.send(self.name, b"")
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

    def _open(self) -> None:
        make_directory(self._directory)
        self._post = Post(self._directory)
        self._inbox = self._post.bind(self.name)
        self._inbox.settimeout(_LOOK)

    def _watch(self) -> None:
        # A greenlet lives on in a forked child, where the socket is still the parent's.
        while not self._closing and os.getpid() == self._pid:
            try:
                message = self._inbox.recv(512)
                if os.getpid() == self._pid:
                    self._deliver(message)
                    self._look()
            except TimeoutError:
                self._look()
            except OSError:
                logger.exception("Cannot receive requests to release locks")
                time.sleep(0.1)
        self._dispose()

    def _look(self) -> None:
        """Find out now and then whether the files of this process still have their names."""
        now = time.monotonic()
        if self._closing or os.getpid() != self._pid or now - self._looked_at < _LOOK / 2:
            return
        self._looked_at = now
        for id, held in list(self._holders.items()):
            if not _has_name(held.lock.fd):
                logger.error("The lock of %s is lost: somebody has removed its file", id)
                ask_to_release(held.on_release_request, LockLost())
        if not self._post.path(self.name).is_socket() and _may_be_made_again(self._directory):
            logger.error("Somebody has removed %s; it is made again", self._post.path(self.name))
            self._dispose()
            self._open()

    def _deliver(self, message: bytes) -> None:
        sent, _, id = message.decode("ascii", "replace").partition(" ")
        held = self._holders.get(id)
        if held is not None and sent.isdigit() and int(sent) >= held.since:
            ask_to_release(held.on_release_request, UploadInterrupted())

    def _dispose(self) -> None:
        self._inbox.close()
        self._post.close()


class Post:
    """Unix datagram sockets by name in a directory, however long its path is."""

    def __init__(self, directory: Path) -> None:
        self._directory = self._prefix = directory
        self._fd: int | None = None
        if len(os.fsencode(self.path(f"{_HOST}{2**32}-{0:08x}.sock"))) > _LONGEST_ADDRESS:
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
        """Return the names of this host's sockets, also of processes that are dead.

        Where hosts share the directory, those of others look dead from here.
        """
        return [path.name for path in self._directory.glob(f"{_HOST}*.sock")]

    def bind(self, name: str) -> socket.socket:
        inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        inbox.bind(str(self._prefix / name))
        # Who may not write to it can neither ask for a lock nor find out that nobody is there.
        adopt(self.path(name), self._directory)
        return inbox

    def send(self, name: str, message: bytes) -> None:
        self._outbox.sendto(message, str(self._prefix / name))

    def close(self) -> None:
        self._outbox.close()
        if self._fd is not None:
            close(self._fd)
            self._fd = None


def is_locked(directory: Path, id: str) -> bool:
    """Whether somebody holds the lock of `id`, found out without disturbing anybody (Linux)."""
    name, place = _place(id)
    fd = _open(directory, name)
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    finally:
        close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _place(id: str) -> tuple[str, int]:
    """Return in which file the lock of `id` is, and which byte of it that is."""
    hashed = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") >> 1
    place, file = divmod(hashed, _FILES)
    return (f"{file:02x}.locks" if _SET_LOCK is not None else f"{id}.lock"), place


def _open(directory: Path, name: str) -> int:
    path = f"{directory}/{contained(name)}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if not _may_be_made_again(directory):
            raise
        make_directory(directory)
        return _make(path, directory)


def _may_be_made_again(directory: Path) -> bool:
    """Whether only the directory of locks is away, and not all that it belongs to.

    Where the data directory is not mounted for a while, it must not come to be on another disk.
    """
    return directory.parent.parent.is_dir()


def _make(path: str, directory: Path) -> int:
    """Make a lock file for all who may make one, whoever of them comes first."""
    # By another name at first: nobody may find it before it is theirs, too.
    unfinished = f"{directory}/.{secrets.token_hex(8)}"
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        adopt(fd, directory)
        os.fchmod(fd, _mode(directory))
        os.link(unfinished, path)
        return fd
    except BaseException as error:
        close(fd)
        if isinstance(error, FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        raise
    finally:
        os.unlink(unfinished)


def _mode(directory: Path) -> int:
    # Never for more: who can read a file can lock it.
    return 0o660 if directory.stat().st_mode & 0o020 else 0o600


def _has_name(fd: int) -> bool:
    try:
        return os.fstat(fd).st_nlink > 0
    except OSError:
        return True  # another thread has closed it a moment ago, and its lock is no more


def _remove_leftovers(directory: Path) -> None:
    """Remove the sockets of processes that died."""
    post = Post(directory)
    for name in post.names():
        try:
            post.send(name, b"")
        except ConnectionRefusedError:
            post.path(name).unlink(missing_ok=True)
        except OSError:
            pass  # alive but busy, or gone already
    post.close()
