"""Bounds what all uploads together may take, in front of any data store.

What counts is what records promise, whether it has arrived or not, so that the limit holds
among all processes and hosts that share the records: one at a time adds up, compares, and
writes the record that promises more. Bytes are the business of the store behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from tuswsgi.core.errors import LimitReached
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.core.options import Size, option
from tuswsgi.datastores.base import (
    DataStore,
    MakeRoom,
    OpenPlace,
    Place,
    Quarantined,
    Readable,
    Source,
)
from tuswsgi.infostores.base import RecordStore
from tuswsgi.lockers.base import Hold, Locker

#: The lock of the one who compares and promises.
_LOCK = "tuswsgi-limit"


@dataclass(repr=False, eq=False)
class LimitedDataStore(DataStore):
    """A data store with a limit for all of it.

    :param inner: the store that keeps the bytes.
    :param infos: the records of all its uploads.
    :param locker: of everybody who writes these records.
    """

    section: ClassVar[str] = "limited"
    bounded = True

    inner: DataStore
    infos: RecordStore
    locker: Locker[Any]
    max_total_size: int | None = option(
        None,
        "How many bytes all uploads together may take, those that are promised and have not "
        "arrived included. One that does not fit is refused (507) until others are gone. "
        "Unset: no limit.",
        kind=Size,
    )
    evict: bool = option(
        False,
        "Remove finished uploads, the oldest first, where others need their room, and tell "
        "post-terminate. One that a hook is still to be told of stays, and so does a part that "
        "a final upload waits for.",
    )

    def __post_init__(self) -> None:
        self.type = self.inner.type
        self.extensions = self.inner.extensions

    @contextmanager
    def reserve(self, info: FileInfo, before: int, make_room: MakeRoom) -> Iterator[None]:
        assert self.max_total_size is not None
        with self.locker.lock(_LOCK) as hold:
            used = self.infos.usage() - before
            missing = used + info.promised - self.max_total_size
            if missing > 0 and self.evict and info.promised <= self.max_total_size:
                freed = make_room(missing, info)
                used = used - freed
                missing = missing - freed
            if missing > 0 and info.promised > before:
                raise LimitReached(self.max_total_size, used, info.promised)
            hold.check()
            yield

    def prepare(self) -> None:
        self.inner.prepare()

    def close(self) -> None:
        self.inner.close()

    def check(self) -> None:
        self.inner.check()

    def place(self, info: FileInfo) -> Storage:
        return self.inner.place(info)

    def create(self, info: FileInfo) -> Storage:
        return self.inner.create(info)

    def create_open(self, info: FileInfo) -> OpenPlace:
        return self.inner.create_open(info)

    def offset(self, info: FileInfo) -> int:
        return self.inner.offset(info)

    def append(self, info: FileInfo, offset: int, source: Source, hold: Hold) -> int:
        return self.inner.append(info, offset, source, hold)

    def seal(self, info: FileInfo) -> Storage:
        return self.inner.seal(info)

    def finish(self, info: FileInfo, hold: Hold) -> Storage:
        return self.inner.finish(info, hold)

    def tidy(self, info: FileInfo) -> None:
        self.inner.tidy(info)

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo], hold: Hold) -> None:
        self.inner.concatenate(info, parts, hold)

    def open(self, info: FileInfo, start: int = 0) -> Readable:
        return self.inner.open(info, start)

    def delete(self, info: FileInfo) -> None:
        self.inner.delete(info)

    def places(self, before: float) -> Iterator[Place]:
        return self.inner.places(before)

    def clear(self, place: Place) -> bool:
        return self.inner.clear(place)

    def quarantine(self, place: Place) -> Quarantined | None:
        return self.inner.quarantine(place)

    def quarantined(self) -> Iterator[Quarantined]:
        return self.inner.quarantined()

    def put_back(self, found: Quarantined) -> bool:
        return self.inner.put_back(found)

    def discard(self, found: Quarantined) -> bool:
        return self.inner.discard(found)

    def location(self, info: FileInfo) -> str | None:
        return self.inner.location(info)

    def free_space(self) -> int | None:
        return self.inner.free_space()
