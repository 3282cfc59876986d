"""The contract of data stores, which store the bytes of uploads.

Only a data store knows how many bytes of an unfinished upload are stored. It knows files or
objects, never sockets, headers or hooks. The contract is tested by
``tuswsgi.testing.datastores``, which you can run for a store of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.lockers.base import HELD, Hold


class Source(Protocol):
    """What ``append`` reads from: a body that is counted and limited.

    A source never fails. If the connection breaks, or the server or another request ends the
    body, the source just ends; after ``append`` the caller looks at why.
    """

    @property
    def provisional(self) -> bool:
        """Whether the bytes count only if ``accepted`` says so (Upload-Checksum)."""

    def read(self, n: int) -> bytes:
        """Return 1 to `n` bytes, as soon as there are any; ``b""`` at the end."""

    def copy_to(self, fd: int, offset: int) -> int:
        """Write all remaining bytes to the file `fd` from `offset` on, in the fastest way.

        `fd` must not be in append mode; its position is not used.

        :returns: how many bytes were written, once the end was reached.
        :raises OSError: if the file cannot be written; what was written before stays.
        """

    def accepted(self, stored: Callable[[], Iterable[bytes]]) -> bool:
        """Return whether a provisional source arrived whole and matches its checksum.

        To be called once, after the end of the source.

        :param stored: returns the bytes that this ``append`` has stored, in blocks. It is
            called only if the checksum came after them.
        """


class Readable(Protocol):
    """The bytes of an upload, opened for one reader at one position.

    An object that also has ``fileno`` is a file whose position is the next byte; the server may
    then send from the descriptor.
    """

    def read(self, n: int = -1, /) -> bytes:
        """Return 1 to `n` bytes, ``b""`` at the end."""

    def close(self) -> None:
        """Release what the reader holds."""


@dataclass(frozen=True)
class StoredFile:
    """A file or object in a data store, with or without a record.

    :param upload: the id of the upload that it belongs to, according to its name.
    :param storage: where it is; the path is one that an operator can find.
    :param size: in bytes.
    :param changed_at: when it was last changed.
    :param is_temporary: the store made it for itself; an old one was left by a crash.
    """

    upload: str
    storage: Storage
    size: int
    changed_at: float
    is_temporary: bool = False


@dataclass(frozen=True)
class Quarantined:
    """A file that was moved to the quarantine.

    :param file: as it was before.
    :param location: where an operator finds it now.
    :param moved_at: when it was moved.
    """

    file: StoredFile
    location: str
    moved_at: float


class OpenUpload:
    """A new and empty upload, open for its first bytes.

    :ivar storage: where it is, as ``DataStore.create`` returns it.
    """

    def __init__(self, store: DataStore, info: FileInfo) -> None:
        self.storage = store.create(info)
        self._store = store
        self._info = info

    def append(self, source: Source) -> int:
        """Append as ``DataStore.append`` does at offset 0. To be called once at most."""
        return self._store.append(self._info.replace(storage=self.storage), 0, source, HELD)

    def close(self) -> None:
        """Release what is held open. The upload stays."""


class DataStore(ABC):
    """Stores the bytes of uploads.

    Whoever calls ``append``, ``seal``, ``finish``, ``concatenate`` or ``delete`` holds the
    lock of the upload. Any method may be interrupted by the death of the process, and every
    method must work on what is left then. Many greenlets or threads call methods at once, for
    different uploads.

    A holder may have lost its lock without knowing. So a store calls ``hold.check`` immediately
    before each step that changes what others may rely on, such as cutting off bytes or replacing
    a file. And it puts the bytes that come after ``seal`` where writers from before cannot reach
    them, whatever they do and however late.

    A full store raises ``StorageFull``, and temporary trouble ``Unavailable``. Anything else
    that goes wrong is an ``OSError`` or the backend's own error: the client gets a 500, and the
    log has the traceback.
    """

    #: The store's name, in ``Storage.type`` and in hooks.
    type: str = ""

    #: What the store supports beyond plain appending, out of ``OF_STORES``: ``CHECKSUM`` with its
    #: trailer, ``CONCATENATION``, ``TERMINATION`` and ``GETTING``. The other extensions need
    #: nothing from a store.
    extensions: frozenset[Extension] = frozenset()

    @abstractmethod
    def prepare(self) -> None:
        """Make ready for use: create directories, check access. May be called again.

        :raises ConfigurationError: if the store cannot work as it is configured.
        """

    def close(self) -> None:
        """Release what this process holds. The store may be used again afterwards."""

    def check(self) -> None:
        """Find out, at little cost, whether bytes can be stored now. May be called often.

        :raises Exception: if they cannot.
        """

    def storage_for(self, info: FileInfo) -> Storage:
        """Return where ``create`` would store a new upload: at its path, if it has one.

        Nothing is created, and a second call may return another path.

        :raises UploadNotFound: if the path is not allowed.
        """
        return Storage(self.type, info.storage.path or info.id)

    @abstractmethod
    def create(self, info: FileInfo) -> Storage:
        """Create a new, empty upload; of two calls for one id or path at most one succeeds.

        :returns: where it is, for its record.
        :raises UploadExists: if the path is in use.
        """

    def create_open(self, info: FileInfo) -> OpenUpload:
        """Create a new upload as ``create`` does, open for its first bytes. The caller closes it.

        The id must never have been used before: leftovers of an upload with the same id, which
        there may be if a hook chooses ids, are not removed.

        :raises UploadExists: as ``create``.
        """
        return OpenUpload(self, info)

    @abstractmethod
    def offset(self, info: FileInfo) -> int:
        """Return how many bytes of an unfinished upload are stored.

        Clients are told this number, so the bytes below it must survive the death of any process
        (and a power loss if the store is configured for that). Provisional bytes that were not
        accepted do not count.

        :raises UploadGone: if the upload's bytes are gone.
        """

    @abstractmethod
    def append(self, info: FileInfo, offset: int, source: Source, hold: Hold) -> int:
        """Store the bytes of `source` from `offset` on.

        `offset` is what ``offset`` returned under the lock that is still held. No append
        shortens an upload, with one exception: provisional bytes that were not accepted are
        removed, after a crash by the next ``append``.

        :returns: the new offset, computed from what this call has stored; bytes that other
            processes have written meanwhile are not included.
        :raises OffsetMismatch: if `offset` is wrong; nothing is changed.
        :raises StorageFull: if there is not enough space; the bytes that fitted count.
        :raises LockLost: if the lock was lost before a step.
        """

    @abstractmethod
    def seal(self, info: FileInfo) -> Storage:
        """Protect the bytes of an unfinished upload from a former holder of its lock.

        That process may not know that it lost the lock. From now on ``offset`` is at least what
        it was, whatever that process still writes, cuts off or deletes. Several processes may
        seal the same `info`; only one of them gets to save its record.

        :returns: where the upload continues; the caller saves that in the record before it does
            anything else.
        :raises UploadGone: if the upload's bytes are gone.
        """

    def finish(self, info: FileInfo, hold: Hold) -> Storage:
        """Do what is left to do once all `info.size` bytes are stored.

        After a crash it is called again, and does what is still missing.

        :returns: where the bytes are from now on, for the record of the finished upload.
        :raises LockLost: if the lock was lost before a step.
        """
        return info.storage

    def delete_leftovers(self, info: FileInfo) -> None:
        """Delete what is no longer needed once the result of ``finish`` is in the record.

        :param info: the upload as ``finish`` got it.
        """

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo], hold: Hold) -> None:
        """Fill the empty upload `info` with the bytes of finished `parts`, in their order.

        This is atomic: ``offset`` is 0 until it is the sum of the parts, also after a crash. It
        may be called again, and by several processes at once, which all make the same bytes.

        :raises UploadGone: if the bytes of a part are gone.
        :raises LockLost: if the lock was lost before a step.
        """
        raise NotImplementedError

    @abstractmethod
    def open(self, info: FileInfo, start: int = 0) -> Readable:
        """Open the bytes of an upload from `start` on. Takes no lock.

        :raises UploadGone: if they are gone.
        """

    @abstractmethod
    def delete(self, info: FileInfo) -> None:
        """Delete the bytes and all that belongs to them. Bytes that are gone are no error."""

    def files(self, before: float) -> Iterator[StoredFile]:
        """Yield the files that were not changed since the time `before`, in any order.

        These are the files of uploads with and without a record, and what crashes have left. A
        store that cannot list its files yields none. Takes no lock, and lets other greenlets
        run.
        """
        return iter(())

    def delete_file(self, file: StoredFile) -> bool:
        """Delete a file that ``files`` yielded, if it has not changed since.

        For temporary files, and for those of removed uploads.

        :returns: whether it was deleted.
        """
        return False

    # A file without a record may still be needed: the records may come from an old backup. So it
    # is moved to a quarantine, where an operator finds it and no other method does. A store
    # without a quarantine leaves it where it is.

    def quarantine(self, file: StoredFile) -> Quarantined | None:
        """Move a file that ``files`` yielded to the quarantine, if it has not changed since.

        :returns: ``None`` if it was not moved.
        """
        return None

    def quarantined(self) -> Iterator[Quarantined]:
        """Yield the files in the quarantine, in any order. Lets other greenlets run."""
        return iter(())

    def restore(self, found: Quarantined) -> bool:
        """Move a file from the quarantine back to its path, unless that is in use.

        :returns: whether it was moved.
        """
        return False

    def discard(self, found: Quarantined) -> bool:
        """Delete a file in the quarantine.

        :returns: whether it was deleted.
        """
        return False

    def location(self, info: FileInfo) -> str | None:
        """Return where an operator finds the bytes: an absolute path or a URL."""
        return info.storage.path

    def free_space(self) -> int | None:
        """Return how many bytes are free, ``None`` if that is unknown."""
        return None
