"""The lockers of this package, held to the contract, alone and among processes."""

from __future__ import annotations

import pytest

from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.memory import MemoryLocker
from tuswsgi.testing.lockers import LockerContract


class TestMemoryLocker(LockerContract):
    @pytest.fixture
    def locker(self):
        return MemoryLocker()


class TestFileLocker(LockerContract):
    directory = "locks"

    @pytest.fixture
    def locker(self, tmp_path):
        yield from self._prepared(tmp_path)

    @pytest.fixture
    def other(self, locker, tmp_path):
        yield from self._prepared(tmp_path)

    def _prepared(self, tmp_path):
        locker = FileLocker(tmp_path / self.directory)
        locker.prepare()
        yield locker
        locker.close()


class TestFileLockerWithLongPath(TestFileLocker):
    directory = "locks-" + "x" * 150
