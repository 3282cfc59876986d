"""Stores bytes in the memory of one process, for tests and for trying things out.

It fulfils the whole contract, so it can replace a real store in tests of the protocol.
"""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tuswsgi.core.errors import OffsetMismatch, UploadExists, UploadGone
from tuswsgi.core.extensions import OF_STORES
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.datastores.base import DataStore, Readable, Source, StoredFile
from tuswsgi.lockers.base import Hold

_BLOCK = 64 * 1024


class MemoryDataStore(DataStore):
    """Stores bytes in a dictionary; they are lost with the process."""

    type = "memory_storage"
    extensions = OF_STORES

    def __init__(self) -> None:
        self._uploads: dict[str, bytes] = {}
        self._changed_at: dict[str, float] = {}

    def prepare(self) -> None:
        pass

    def create(self, info: FileInfo) -> Storage:
        storage = self.storage_for(info)
        key = _key(info.replace(storage=storage))
        if key in self._uploads:
            raise UploadExists
        self._put(key, b"")
        return storage

    def offset(self, info: FileInfo) -> int:
        return len(self._bytes(info))

    def append(self, info: FileInfo, offset: int, source: Source, hold: Hold) -> int:
        stored = self._bytes(info)
        if len(stored) != offset:
            raise OffsetMismatch(len(stored))
        arrived = bytearray()
        while block := source.read(_BLOCK):
            arrived += block
            if not source.provisional:
                self._put(_key(info), stored + arrived)
        if source.provisional:
            if not source.accepted(lambda: [bytes(arrived)]):
                return offset
            hold.check()
            self._put(_key(info), stored + arrived)
        return offset + len(arrived)

    def seal(self, info: FileInfo) -> Storage:
        storage = replace(info.storage, details={"copy": secrets.token_hex(8)})
        self._put(_key(info.replace(storage=storage)), self._bytes(info))
        return storage

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo], hold: Hold) -> None:
        self._bytes(info)
        joined = b"".join(self._bytes(part) for part in parts)
        hold.check()
        self._put(_key(info), joined)

    def open(self, info: FileInfo, start: int = 0) -> Readable:
        return io.BytesIO(self._bytes(info)[start:])

    def delete(self, info: FileInfo) -> None:
        name = _name(info)
        for key in tuple(self._uploads):
            if key == name or key.startswith(f"{name}#"):
                self._remove(key)

    def files(self, before: float) -> Iterator[StoredFile]:
        for key in tuple(self._uploads):
            file = self._file(key)
            if file is not None and file.changed_at < before:
                yield file

    def delete_file(self, file: StoredFile) -> bool:
        key = file.storage.path or ""
        if self._file(key) != file:
            return False
        self._remove(key)
        return True

    def _file(self, key: str) -> StoredFile | None:
        data = self._uploads.get(key)
        if data is None:
            return None
        name = key.rpartition("/")[2]
        return StoredFile(name, Storage(self.type, key), len(data), self._changed_at[key])

    def _put(self, key: str, data: bytes) -> None:
        self._changed_at[key] = time.time()
        self._uploads[key] = data

    def _remove(self, key: str) -> None:
        if self._uploads.pop(key, None) is not None:
            del self._changed_at[key]

    def _bytes(self, info: FileInfo) -> bytes:
        try:
            return self._uploads[_key(info)]
        except KeyError:
            raise UploadGone from None


def _key(info: FileInfo) -> str:
    copy = info.storage.details.get("copy")
    return f"{_name(info)}#{copy}" if copy else _name(info)


def _name(info: FileInfo) -> str:
    return info.storage.path or info.id
