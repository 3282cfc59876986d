"""Keeps bytes in the memory of one process: for tests and for trying things out.

It obeys the whole contract, so it stands in for real stores in tests of the protocol.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import ClassVar

from tuswsgi.datastores.base import DataStore, Readable, Source
from tuswsgi.errors import OffsetMismatch, UploadExists, UploadGone
from tuswsgi.extensions import OF_STORES, Extension
from tuswsgi.info import FileInfo, Storage

_BLOCK = 64 * 1024


class MemoryDataStore(DataStore):
    """Bytes in a dictionary; they are gone with the process."""

    type = "memory_storage"
    extensions: ClassVar[frozenset[Extension]] = OF_STORES

    def __init__(self) -> None:
        self._uploads: dict[str, bytes] = {}

    def prepare(self) -> None:
        pass

    def create(self, info: FileInfo) -> Storage:
        storage = self.place(info)
        key = _key(info.but(storage=storage))
        if key in self._uploads:
            raise UploadExists
        self._uploads[key] = b""
        return storage

    def offset(self, info: FileInfo) -> int:
        return len(self._bytes(info))

    def append(self, info: FileInfo, offset: int, source: Source) -> int:
        kept = self._bytes(info)
        if len(kept) != offset:
            raise OffsetMismatch(len(kept))
        arrived = bytearray()
        while block := source.read(_BLOCK):
            arrived += block
            if not source.provisional:
                self._uploads[_key(info)] = kept + arrived
        if source.provisional and source.accepted(lambda: [bytes(arrived)]):
            self._uploads[_key(info)] = kept + arrived
        return len(self._bytes(info))

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo]) -> None:
        self._bytes(info)
        self._uploads[_key(info)] = b"".join(self._bytes(part) for part in parts)

    def open(self, info: FileInfo, start: int = 0) -> Readable:
        return io.BytesIO(self._bytes(info)[start:])

    def delete(self, info: FileInfo) -> None:
        self._uploads.pop(_key(info), None)

    def _bytes(self, info: FileInfo) -> bytes:
        try:
            return self._uploads[_key(info)]
        except KeyError:
            raise UploadGone from None


def _key(info: FileInfo) -> str:
    return info.storage.path or info.id
