"""Locked bytes of files: the kernel releases them when the process dies.

A lock is one byte of one of 64 files, chosen by the hash of the id. A file per lock would be
created and removed with every request, and file systems like ext4 get slower and slower at
that.

The directory may be removed while locks are held, for instance by a cleaner of temporary files.
It is created again. A lock in a file that was removed no longer excludes others, see ``is_lost``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import struct
from pathlib import Path

# gevent's os.close looks for watchers of the descriptor; files have none.
from posix import close
from typing import NamedTuple

from tuswsgi.core.errors import UploadNotFound
from tuswsgi.core.paths import adopt, contained, make_directory

#: How many files share the locks: the kernel searches all locks of a file.
_FILES = 64

#: How many descriptors of each file stay open without a lock.
_MAX_IDLE = 4

#: Open file description locks (Linux): unlike those of lockf they also exclude the greenlets
#: of one process. Elsewhere each lock has its own file, which is never deleted.
_SET_LOCK: int | None = getattr(fcntl, "F_OFD_SETLK", None)

#: ``struct flock``: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


class FileLock(NamedTuple):
    """A locked byte of an open file."""

    file: str
    fd: int
    offset: int

    def is_lost(self) -> bool:
        """Whether the file was removed: others lock its successor."""
        try:
            return os.fstat(self.fd).st_nlink == 0
        except OSError:
            return False  # another thread has just released the lock and closed the file


class LockFiles:
    """The lock files of one process.

    Released descriptors stay open for the next lock, since opening costs more than locking.
    Each lock has a descriptor of its own, or greenlets would share locks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._idle: dict[str, list[int]] = {}

    def try_lock(self, id: str) -> FileLock | None:
        """Return the lock of `id`, ``None`` if it is held already."""
        if "/" in id:
            raise UploadNotFound
        file, offset = _byte_of(id)
        lock = FileLock(file, self._open(file), offset)
        try:
            if _SET_LOCK is not None:
                fcntl.fcntl(lock.fd, _SET_LOCK, _flock(fcntl.F_WRLCK, offset))
            else:
                fcntl.flock(lock.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._keep_or_close(lock)
            return None
        except BaseException:
            close(lock.fd)
            raise
        return lock

    def unlock(self, lock: FileLock) -> None:
        if _SET_LOCK is None:
            close(lock.fd)
            return
        try:
            fcntl.fcntl(lock.fd, _SET_LOCK, _flock(fcntl.F_UNLCK, lock.offset))
        except BaseException:
            close(lock.fd)
            raise
        self._keep_or_close(lock)

    def close(self) -> None:
        """Close the idle descriptors."""
        while self._idle:
            _, idle = self._idle.popitem()
            for fd in idle:
                close(fd)

    def _open(self, file: str) -> int:
        try:
            fd = self._idle[file].pop()
        except LookupError:
            return _open(self._directory, file)
        if os.fstat(fd).st_nlink:
            return fd
        # The file was removed: others lock its successor.
        close(fd)
        return _open(self._directory, file)

    def _keep_or_close(self, lock: FileLock) -> None:
        idle = self._idle.setdefault(lock.file, [])
        if _SET_LOCK is not None and len(idle) < _MAX_IDLE:
            idle.append(lock.fd)
        else:
            close(lock.fd)


def is_locked(directory: Path, id: str) -> bool:
    """Whether the lock of `id` is held, without taking it (Linux only)."""
    file, offset = _byte_of(id)
    fd = _open(directory, file)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, offset))
    finally:
        close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def may_create(directory: Path) -> bool:
    """Whether the directory of locks may be created again.

    Not while the data directory is missing, for instance because its disk is not mounted: the
    locks would be on another disk.
    """
    return directory.parent.parent.is_dir()


def _flock(kind: int, offset: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)


def _byte_of(id: str) -> tuple[str, int]:
    """Return the name of the file, and the offset in it, of the lock of `id`."""
    hashed = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") >> 1
    offset, number = divmod(hashed, _FILES)
    return (f"{number:02x}.locks" if _SET_LOCK is not None else f"{id}.lock"), offset


def _open(directory: Path, file: str) -> int:
    path = f"{directory}/{contained(file)}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if not may_create(directory):
            raise
        make_directory(directory)
        return _create(path, directory)


def _create(path: str, directory: Path) -> int:
    """Create a lock file that other processes may open, too, or open theirs if it exists by now."""
    # Under a temporary name first, so that the others find it with its final owner and mode.
    temporary = f"{directory}/.{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        adopt(fd, directory)
        os.fchmod(fd, _mode(directory))
        os.link(temporary, path)
        return fd
    except BaseException as error:
        close(fd)
        if isinstance(error, FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        raise
    finally:
        os.unlink(temporary)


def _mode(directory: Path) -> int:
    # Not for all: who can read a file can lock it.
    return 0o660 if directory.stat().st_mode & 0o020 else 0o600
