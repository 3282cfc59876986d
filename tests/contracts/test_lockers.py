"""The lockers for one process and for one host."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuswsgi.core.errors import (
    ConfigurationError,
    LockLost,
    StorageFull,
    Unavailable,
    UploadInterrupted,
    UploadLocked,
    UploadNotFound,
)
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

    def test_a_late_request_is_dropped(self, locker, other):
        first, second = Requests(), Requests()
        with locker.lock("a", first):
            sent = time.monotonic_ns()
        with locker.lock("a", second):
            self._send(other, f"{sent} a".encode())
            self._flush(locker)
        assert first.reasons == second.reasons == []

    def _send(self, locker, message):
        sockets = locker._listener.get()._sockets
        for name in sockets.names():
            sockets.send(name, message)

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
        "message", [b"", b"x", b" ", b"99999999999999999999 b", b"-1 a", b"x a", b"\xff a"]
    )
    def test_a_socket_may_receive_anything(self, locker, other, message):
        requests = Requests()
        with locker.lock("a", requests):
            self._send(other, message)
            self._flush(locker)
        assert requests.reasons == []

    @pytest.mark.parametrize("id", ["../a", "a/b", "/"])
    def test_ids_are_one_segment(self, locker, id):
        with pytest.raises(UploadNotFound), locker.lock(id, ignore):
            pytest.fail("locked")

    def test_a_lock_file_that_was_removed(self, locker, other):
        with locker.lock("a"):
            pass
        for file in locker.directory.glob("*.locks"):
            file.unlink()
        with other.lock("a"), pytest.raises(UploadLocked), locker.try_lock("a"):
            pass

    def test_a_removed_directory_is_created_again(self, locker, other):
        with locker.lock("a", ignore):
            pass
        shutil.rmtree(locker.directory)
        locker.check()
        shutil.rmtree(locker.directory)
        requests = Requests()
        with locker.lock("a", requests), pytest.raises(UploadLocked), other.try_lock("a", ignore):
            pytest.fail("two holders")
        with self._held(locker, "a", requests) as release, ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(self._take, other, "a")
            requests.wait_for(UploadInterrupted)
            release.set()
            waiter.result(SOON)

    def test_the_holder_of_a_lock_whose_file_was_removed_is_told(self, locker, other):
        requests = Requests()
        with locker.lock("a", requests):
            shutil.rmtree(locker.directory)
            with other.lock("a", ignore):
                requests.wait_for(LockLost)

    def test_sockets_of_other_hosts_stay(self, locker, other):
        theirs = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sockets = locker._listener.get()._sockets
        theirs.bind(str(sockets._prefix / "01234567-1-89abcdef.sock"))
        theirs.close()
        other.prepare()
        assert sockets.path("01234567-1-89abcdef.sock").is_socket()
        sockets.path("01234567-1-89abcdef.sock").unlink()

    def test_nothing_is_left_behind(self, locker):
        with locker.lock("a", ignore), locker.lock("b", ignore):
            pass
        self.test_a_later_holder_is_not_asked(locker)
        locker.close()
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        files = [os.readlink(link) for link in links if os.path.islink(link)]
        assert not [file for file in files if file.startswith(f"{locker.directory}/")]
        locker.close()
        assert {path.suffix for path in locker.directory.iterdir()} <= {".lock", ".locks"}

    def test_the_number_of_files_is_bounded(self, locker):
        for number in range(1000):
            with locker.lock(f"id{number}", ignore):
                pass
        assert len(list(locker.directory.glob("*.locks"))) <= 64

    def test_errors_of_the_disk_are_reported(self, locker, monkeypatch):
        for number, error in ((errno.ENOSPC, StorageFull), (errno.EMFILE, Unavailable)):

            def fail(*args, number=number):
                raise OSError(number, "broken")

            with monkeypatch.context() as patch:
                patch.setattr(os, "open", fail)
                with pytest.raises(error), locker.lock("a", ignore):
                    pytest.fail("locked")

    def test_an_unusable_directory_is_reported(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match="cannot be used"):
            FileLocker(tmp_path / "file").prepare()


class TestFileLockerWithoutRanges(TestFileLocker):
    """Where the kernel has no open file description locks, each lock is a file."""

    @pytest.fixture(autouse=True)
    def _no_ranges(self, monkeypatch):
        monkeypatch.setattr("tuswsgi.lockers.lock_files._SET_LOCK", None)


class TestFileLockerWithLongPath(TestFileLocker):
    directory = "locks-" + "x" * 150


class TestFileLockerWithoutProc(TestFileLockerWithLongPath):
    """Without /proc, the sockets of a long path are in another directory."""

    @pytest.fixture(autouse=True)
    def _no_proc(self, monkeypatch, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("s")
        is_dir = Path.is_dir
        monkeypatch.setattr(
            Path, "is_dir", lambda path: str(path) != "/proc/self/fd" and is_dir(path)
        )
        monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
