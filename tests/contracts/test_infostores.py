"""The info stores of this package, held to the contract, alone and among processes."""

from __future__ import annotations

import pytest

from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.infostores import InfoStoreContract


class TestMemoryInfoStore(InfoStoreContract):
    @pytest.fixture
    def store(self):
        store = MemoryInfoStore()
        store.prepare()
        return store


class Shared(InfoStoreContract):
    """Stores that several instances share."""

    @pytest.fixture
    def store(self, tmp_path):
        yield from self._prepared(tmp_path)

    @pytest.fixture
    def other(self, store, tmp_path):
        yield from self._prepared(tmp_path)

    def _prepared(self, directory):
        store = self.make(directory)
        store.prepare()
        yield store
        store.close()


class TestFileInfoStore(Shared):
    def make(self, directory):
        return FileInfoStore(directory / "info")


class TestDurableFileInfoStore(Shared):
    def make(self, directory):
        return FileInfoStore(directory / "info", force_fsync=True)


class TestSqliteInfoStore(Shared):
    def make(self, directory):
        return SqlInfoStore(f"sqlite:///{directory}/db/info.sqlite3")


class TestDurableSqliteInfoStore(Shared):
    def make(self, directory):
        return SqlInfoStore(f"sqlite:///{directory}/db/info.sqlite3", force_fsync=True)
