"""The contract of data stores: where the bytes of uploads are kept.

A data store owns one fact: how many bytes of an unfinished upload are kept. It knows
files or objects, never sockets, headers or hooks. The contract is tested by
``tuswsgi.testing.datastores``, which a store of your own can run too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.lockers.base import SURE, Hold


class Source(Protocol):
    """What ``append`` reads from: a body that has been counted and limited.

    The end of the source is always clean. A connection that broke, a takeover and a
    stop look like the end of the input; whoever made the source looks at its error
    after the store has kept what arrived.
    """

    @property
    def provisional(self) -> bool:
        """Whether the bytes count only if ``accepted`` says so (Upload-Checksum)."""

    def read(self, n: int) -> bytes:
        """Return 1 to `n` bytes, as soon as any are there; ``b""`` at the end."""

    def copy_to(self, fd: int, offset: int) -> int:
        """Write everything that is left to the file `fd` from `offset` on.

        The fastest way that the server allows is taken. `fd` must not be in append
        mode; its position is not used.

        :returns: the number of bytes written, when the end has been reached.
        :raises OSError: if the file cannot be written; what was written before stays.
        """

    def accepted(self, stored: Callable[[], Iterable[bytes]]) -> bool:
        """Whether a provisional source arrived whole and matches its checksum.

        To be asked once, after the end of the source.

        :param stored: returns the bytes that this ``append`` stored, in blocks; they
            are asked for only if the checksum came after them.
        """


class Readable(Protocol):
    """The bytes of an upload, opened for one reader at one position.

    An object that also has ``fileno`` is a file whose position is the next byte; the
    server may then send from the descriptor.
    """

    def read(self, n: int = -1, /) -> bytes:
        """Return 1 to `n` bytes, ``b""`` at the end."""

    def close(self) -> None:
        """Release what the reader holds."""


@dataclass(frozen=True)
class Place:
    """Something that lies in a data store, whether anybody knows of it or not.

    :param upload: what would be the id of the upload, as the name says it.
    :param storage: where it is; the path is one that an operator can find.
    :param size: how many bytes it takes.
    :param changed_at: when it was changed the last time.
    :param is_temporary: it is the store's own, and left there by a crash if it is old.
    """

    upload: str
    storage: Storage
    size: int
    changed_at: float
    is_temporary: bool = False


@dataclass(frozen=True)
class Quarantined:
    """Something that was moved away from the uploads, for nobody knew of it.

    :param place: what it was, and where.
    :param location: where an operator finds it now.
    :param moved_at: when it was moved.
    """

    place: Place
    location: str
    moved_at: float


class OpenUpload:
    """The empty place of a new upload, ready for its first bytes.

    :ivar storage: where it is, as ``DataStore.create`` says it.
    """

    def __init__(self, store: DataStore, info: FileInfo) -> None:
        self.storage = store.create(info)
        self._store = store
        self._info = info

    def append(self, source: Source) -> int:
        """Keep the bytes of `source`, as ``DataStore.append`` does at offset 0. At most once."""
        return self._store.append(self._info.replace(storage=self.storage), 0, source, SURE)

    def close(self) -> None:
        """Release what is held, not the place."""


class DataStore(ABC):
    """Keeps the bytes of uploads.

    Whoever calls ``append``, ``seal``, ``finish``, ``concatenate`` or ``delete`` holds the
    lock of the upload. Every method may be interrupted by the death of the process, and after
    that every method must work on what is left. Methods are called by many greenlets or
    threads at once, for different uploads.

    A holder can lose its lock and not know it. So a store calls ``hold.check`` immediately
    before each step that changes what others may rely on: a byte that is cut off, a file that
    takes another one's place. And it keeps the bytes that come after ``seal`` where a writer
    from before it does not reach them, whatever that one does and however late.

    A full store raises ``StorageFull``; trouble that passes raises ``Unavailable``;
    anything else that goes wrong is an ``OSError`` or the backend's own error, which
    the client sees as a 500 and the log in full.
    """

    #: The store's name, in ``Storage.type`` and in hooks.
    type: str = ""

    #: What the store can serve beyond plain appending: of ``CHECKSUM`` (with its
    #: trailer), ``CONCATENATION``, ``TERMINATION`` and ``GETTING``. The other extensions
    #: need nothing of a store.
    extensions: frozenset[Extension] = frozenset()

    @abstractmethod
    def prepare(self) -> None:
        """Make ready for use: create directories, check access. May be called again.

        :raises ConfigurationError: if the store cannot work as it is configured.
        """

    def close(self) -> None:
        """Release what this process holds. The store may be used again afterwards."""

    def check(self) -> None:
        """Find out, at little cost, whether bytes can be kept now. May be called often.

        :raises Exception: if they cannot.
        """

    def storage_for(self, info: FileInfo) -> Storage:
        """Return where ``create`` will keep a new upload: at its path, if that was chosen.

        Nothing is made yet, and who asks twice may hear two places.

        :raises UploadNotFound: if no upload may lie there.
        """
        return Storage(self.type, info.storage.path or info.id)

    @abstractmethod
    def create(self, info: FileInfo) -> Storage:
        """Make an empty place for a new upload.

        The place is made exclusively: two calls for one id or path never both succeed.

        :returns: where it is, to be kept in the upload's info.
        :raises UploadExists: if the place is taken.
        """

    def create_open(self, info: FileInfo) -> OpenUpload:
        """Do as ``create`` for who goes on with ``append`` at once; to be closed by the caller.

        The id must be a new one, that nobody ever had: nothing can be left of an upload
        before it, as may be where a hook chooses an id or a path again.

        :raises UploadExists: as ``create``.
        """
        return OpenUpload(self, info)

    @abstractmethod
    def offset(self, info: FileInfo) -> int:
        """Return how many bytes of an unfinished upload are kept.

        This number is told to clients, so the bytes below it survive the death of any
        process (and a power loss where the store is configured to promise that). Bytes
        that a provisional source left behind do not count.

        :raises UploadGone: if the upload's bytes are not there any more.
        """

    @abstractmethod
    def append(self, info: FileInfo, offset: int, source: Source, hold: Hold) -> int:
        """Keep the bytes of `source` from `offset` on.

        `offset` is what ``offset`` returned under the lock that is still held. No append
        shortens an upload, with one exception: bytes of a provisional source that were
        not accepted are removed, also by the next ``append`` if a crash came in between.

        :returns: the new offset, from what this call has kept: what others have written
            meanwhile is not its own.
        :raises OffsetMismatch: if `offset` is not the store's own; nothing is changed.
        :raises StorageFull: if there is no room; what fitted is kept and counts.
        :raises LockLost: if the lock was lost before a step.
        """

    @abstractmethod
    def seal(self, info: FileInfo) -> Storage:
        """Keep what there is of an unfinished upload from whoever wrote it until now.

        The holder of its lock before may not know that it lost it. From now on ``offset`` is
        what it was, or more, whatever that one still writes, cuts off or removes. It may be
        done again for the same `info`, by others too, of whom only one gets to save its record.

        :returns: where the upload goes on; the caller saves that in the record before it does
            anything else.
        :raises UploadGone: if the upload's bytes are not there any more.
        """

    def finish(self, info: FileInfo, hold: Hold) -> Storage:
        """Do what is left to do once all `info.size` bytes are kept.

        It may be called again after a crash and must then do nothing or the rest.

        :returns: where the bytes are from now on, for the record of the finished upload.
        :raises LockLost: if the lock was lost before a step.
        """
        return info.storage

    def tidy(self, info: FileInfo) -> None:
        """Remove what ``finish`` has made superfluous, once its result is in the record.

        :param info: the upload as ``finish`` got it.
        """

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo], hold: Hold) -> None:
        """Fill the empty upload `info` with the bytes of finished `parts`, in their order.

        Nobody sees a half-filled upload: afterwards ``offset`` is the sum of the parts,
        before it is 0, also after a crash. It may be called again.

        Two who build it at once make the same of it, and neither disturbs the other.

        :raises UploadGone: if the bytes of a part are not there any more.
        :raises LockLost: if the lock was lost before a step.
        """
        raise NotImplementedError

    @abstractmethod
    def open(self, info: FileInfo, start: int = 0) -> Readable:
        """Open the bytes of an upload from `start` on. Takes no lock.

        :raises UploadGone: if they are not there (any more).
        """

    @abstractmethod
    def delete(self, info: FileInfo) -> None:
        """Remove the bytes and whatever belongs to them. What is not there is no error."""

    def places(self, before: float) -> Iterator[Place]:
        """Yield what was not changed since the time `before`, in any order.

        That is the data of uploads, with and without a record, and what only a crash can
        have left. A store that cannot tell yields nothing. Takes no lock, and lets others
        run.
        """
        return iter(())

    def clear(self, place: Place) -> bool:
        """Remove for good what ``places`` found if it is still as it was then.

        That is for what is temporary, and for what is left of uploads that were removed.

        :returns: whether it was removed.
        """
        return False

    # What has no record may be missed all the same: records may be those of a backup. So it
    # is moved to a quarantine, from where an operator can put it back by hand, and where
    # neither ``places`` nor any other method finds it. A store that has none leaves it.

    def quarantine(self, place: Place) -> Quarantined | None:
        """Move what ``places`` found to the quarantine if it is still as it was then.

        :returns: ``None`` if it was not moved.
        """
        return None

    def quarantined(self) -> Iterator[Quarantined]:
        """Yield what is in the quarantine, in any order. Lets others run."""
        return iter(())

    def put_back(self, found: Quarantined) -> bool:
        """Move it from the quarantine to its place, unless something else is there now.

        :returns: whether it was moved.
        """
        return False

    def discard(self, found: Quarantined) -> bool:
        """Remove what is in the quarantine for good.

        :returns: whether it was removed.
        """
        return False

    def location(self, info: FileInfo) -> str | None:
        """Return where an operator finds the bytes: an absolute path or a URL."""
        return info.storage.path

    def free_space(self) -> int | None:
        """Return how many bytes more fit; ``None`` where nobody knows."""
        return None
