"""The lockers of this package, held to the contract, alone and among processes."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tuswsgi.errors import ConfigurationError, StorageFull, Unavailable, UploadNotFound
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.memory import MemoryLocker
from tuswsgi.testing.lockers import SOON, LockerContract, Requests, ignore


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

    def test_a_late_request_is_for_nobody(self, locker, other):
        first, second = Requests(), Requests()
        with locker.lock("a", first):
            line = (locker.directory / "a.lock").read_text().split()
        with locker.lock("a", second):
            other._mailbox.get().send(line[0], line[1].encode())
            self._flush(locker)
        assert first.reasons == second.reasons == []

    def test_asking_never_blocks(self, locker, other):
        stuck, release = Requests(), threading.Event()

        def block(reason):
            stuck(reason)
            release.wait(SOON)

        with locker.lock("a", block):
            other._request_release("a")
            stuck.wait()
            for _ in range(1000):
                other._request_release("a")
            release.set()
        self._flush(locker)

    @pytest.mark.parametrize(
        "line", [b"", b"x", b"../x 0\n", b"1-00000000.sock 0123456789abcdef\n"]
    )
    def test_a_lock_file_may_hold_anything(self, locker, line):
        path = locker.directory / "a.lock"
        path.write_bytes(line * 20)
        locker._request_release("a")
        self._flush(locker)
        with locker.lock("a", ignore):
            pass
        assert not path.exists()

    @pytest.mark.parametrize("id", ["..", "../a", "a/b", "", "/", ".a", "a\0b", "a" * 300])
    def test_ids_stay_inside_of_the_directory(self, locker, id):
        with pytest.raises(UploadNotFound), locker.lock(id, ignore):
            pytest.fail("locked")

    def test_nothing_is_left_behind(self, locker):
        with locker.lock("a", ignore), locker.lock("b", ignore):
            pass
        self.test_a_later_holder_is_not_asked(locker)
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        files = [os.readlink(link) for link in links if os.path.islink(link)]
        assert not [file for file in files if file.startswith(f"{locker.directory}/")]
        locker.close()
        assert list(locker.directory.iterdir()) == []

    def test_a_lock_whose_file_was_removed_can_be_released(self, locker):
        with locker.lock("a", ignore):
            (locker.directory / "a.lock").unlink()
            with locker.lock("a", ignore):
                pass
        with locker.lock("a", ignore):
            pass

    def test_trouble_with_the_disk_is_told(self, locker, monkeypatch):
        for number, error in ((errno.ENOSPC, StorageFull), (errno.EMFILE, Unavailable)):

            def fail(*args, number=number):
                raise OSError(number, "broken")

            with monkeypatch.context() as patch:
                patch.setattr(os, "open", fail)
                with pytest.raises(error), locker.lock("a", ignore):
                    pytest.fail("locked")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with locker.lock("a", ignore):
                pass

    def test_a_directory_that_cannot_be_is_said(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match="cannot be used"):
            FileLocker(tmp_path / "file").prepare()


class TestFileLockerWithLongPath(TestFileLocker):
    directory = "locks-" + "x" * 150


class TestFileLockerWithoutProc(TestFileLockerWithLongPath):
    """Where no short name of a long path can be had, sockets are elsewhere."""

    @pytest.fixture(autouse=True)
    def _no_proc(self, monkeypatch, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("s")
        is_dir = Path.is_dir
        monkeypatch.setattr(
            Path, "is_dir", lambda path: str(path) != "/proc/self/fd" and is_dir(path)
        )
        monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
