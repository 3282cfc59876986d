"""The data stores of this package, held to the contract; and files after a crash."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tuswsgi.core.errors import (
    ConfigurationError,
    OffsetMismatch,
    StorageFull,
    UploadGone,
    UploadNotFound,
)
from tuswsgi.core.info import FileInfo, Metadata, Storage
from tuswsgi.core.paths import inside
from tuswsgi.datastores.file import FileDataStore
from tuswsgi.datastores.memory import MemoryDataStore
from tuswsgi.lockers.base import HELD
from tuswsgi.testing.datastores import LARGE, Blocks, DataStoreContract, content, created

#: A time after which nothing was changed.
LATER = 1e11

ROOT = Path(__file__).parent.parent.parent


class TestMemoryDataStore(DataStoreContract):
    @pytest.fixture
    def store(self):
        store = MemoryDataStore()
        store.prepare()
        return store


class TestFileDataStore(DataStoreContract):
    options: dict = {}  # noqa: RUF012

    @pytest.fixture
    def store(self, tmp_path):
        return self.make(tmp_path)

    @pytest.fixture
    def other(self, store, tmp_path):
        return self.make(tmp_path)

    def make(self, tmp_path):
        store = FileDataStore(tmp_path / "data", **self.options)
        store.prepare()
        return store

    @pytest.mark.parametrize("provisional", [False, True])
    def test_bytes_behind_a_marker_do_not_count(self, store, provisional):
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"good" + b"unverified")
        marker_of(path).write_text("4\n")
        assert store.offset(info) == 4
        with pytest.raises(OffsetMismatch):
            store.append(info, 14, Blocks(b"x"), HELD)
        assert path.read_bytes() == b"goodunverified"
        assert store.append(info, 4, Blocks(b"!", provisional=provisional), HELD) == 5
        assert path.read_bytes() == b"good!"
        assert not marker_of(path).exists()

    def test_a_marker_of_nothing_hides_nothing(self, store):
        # The process died after it wrote the marker and before the first byte.
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"good")
        for start in (4, 9):
            marker_of(path).write_text(f"{start}\n")
            assert store.offset(info) == 4
        assert store.append(info, 4, Blocks(b"!"), HELD) == 5
        assert store.offset(info) == 5

    @pytest.mark.parametrize("torn", ["", "1"])
    def test_a_torn_marker_counts_for_nothing(self, store, torn):
        # The process died while it wrote the marker, so nothing unverified followed.
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"0123456789")
        marker_of(path).write_text(torn)
        assert store.offset(info) == 10
        assert store.append(info, 10, Blocks(b"!"), HELD) == 11
        assert not marker_of(path).exists()

    def test_sigkill_in_the_middle_of_joining_leaves_nothing(self, store):
        part = self.part(store, b"part")
        final = self.final(store, part)
        before = files_below(store.data_dir)
        paths = [info.storage.path for info in (final, part)]
        result = subprocess.run(
            [sys.executable, "-c", DYING_JOINER, store.data_dir, *paths], cwd=ROOT, timeout=60
        )
        assert result.returncode == -signal.SIGKILL
        assert files_below(store.data_dir) == before
        assert store.offset(final) == 0
        store.concatenate(final, [part], HELD)
        assert content(store, final) == b"part"

    def test_joining_works_without_unnamed_files(self, store, monkeypatch):
        monkeypatch.setattr("tuswsgi.datastores.file.UNNAMED", 0)
        self.test_parts_are_joined_in_their_order(store)
        assert not any(name.startswith(".") for name in files_below(store.data_dir))

    def test_deleting_removes_what_crashes_left(self, store):
        info = created(store)
        path = Path(store.location(info))
        marker_of(path).write_text("0\n")
        store.delete(info)
        assert list(path.parent.iterdir()) == []

    def test_a_part_that_is_too_short_leaves_nothing(self, store):
        part = self.part(store, b"part")
        final = self.final(store, part)
        Path(store.location(part)).write_bytes(b"par")
        with pytest.raises(UploadGone):
            store.concatenate(final, [part], HELD)
        assert store.offset(final) == 0
        assert files_below(store.data_dir) == sorted(
            Path(store.location(info)).name for info in (part, final)
        )

    def test_nothing_is_left_of_a_refused_body(self, store):
        info = created(store)
        store.append(info, 0, Blocks(b"bad", provisional=True, accepts=False), HELD)
        assert files_below(store.data_dir) == [info.id]

    @pytest.mark.parametrize(("provisional", "kept"), [(False, 7), (True, 3)])
    def test_sigkill_in_the_middle_of_a_body(self, store, provisional, kept):
        info = created(store)
        store.append(info, 0, Blocks(b"old"), HELD)
        result = subprocess.run(
            [sys.executable, "-c", DYING, store.data_dir, info.storage.path, str(provisional)],
            cwd=ROOT,
            timeout=60,
        )
        assert result.returncode == -signal.SIGKILL
        assert Path(store.location(info)).read_bytes() == b"oldlost"[: 3 + 4]
        assert store.offset(info) == kept
        store.append(info, kept, Blocks(b"!"), HELD)
        assert content(store, info) == b"oldlost"[:kept] + b"!"

    def test_what_crashes_left_is_found(self, store):
        info, gone = created(store), FileInfo(id="gone")
        path = Path(store.location(info))
        left = path.with_name(f".{path.name}.concat-0123456789abcdef")
        left.write_text("half")
        sealed = info.replace(storage=store.seal(info))
        stale = marker_of(path.with_name(gone.id))
        stale.write_text("0\n")
        marker_of(path).write_text("0\n")
        found = {file.storage.path.rpartition("/")[2]: file for file in store.files(LATER)}
        assert set(found) == {path.name, left.name, stale.name}
        assert {file.upload for file in found.values() if file.is_temporary} == {
            info.id,
            gone.id,
        }
        for file in found.values():
            assert store.delete_file(file)
        segment = f".{path.name}.segment1"
        assert files_below(store.data_dir) == sorted([marker_of(path).name, segment])
        (orphan, _) = sorted(store.files(LATER), key=lambda file: file.storage.path)
        assert orphan.storage.path.endswith(segment)
        assert orphan.is_temporary, "its upload is gone"
        store.delete(sealed)
        assert files_below(store.data_dir) == []

    def test_what_is_hidden_is_nobodys_business(self, store):
        for name in (".tuswsgi/info/x.info", ".note", ".git/objects/ab", "a/.b/c"):
            (store.data_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (store.data_dir / name).write_text("mine")
        (store.data_dir / "link").symlink_to("/etc/passwd")
        (store.data_dir / "directory").symlink_to("/etc")
        assert list(store.files(LATER)) == []

    def test_mv_puts_back_what_was_moved(self, store):
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"bytes")
        (file,) = store.files(LATER)
        location = Path(store.quarantine(file).location)
        relative = path.relative_to(store.data_dir)
        (folder,) = (store.data_dir / ".tuswsgi" / "quarantine").iterdir()
        assert location == (folder / relative).absolute()
        assert location.read_bytes() == b"bytes"
        location.rename(path)
        assert content(store, info) == b"bytes"

    def test_unverified_bytes_do_not_count_when_they_are_back(self, store):
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"bytes")
        marker_of(path).write_text("3\n")
        (file,) = store.files(LATER)
        moved = store.quarantine(file)
        assert list(store.files(LATER)) == []
        assert store.restore(moved)
        assert store.offset(info) == 3
        assert [*(store.data_dir / ".tuswsgi" / "quarantine").iterdir()] == []

    def test_nothing_stays_of_what_is_discarded(self, store):
        path = Path(store.location(created(store)))
        marker_of(path).write_text("0\n")
        (file,) = store.files(LATER)
        assert store.discard(store.quarantine(file))
        assert list((store.data_dir / ".tuswsgi" / "quarantine").iterdir()) == []

    def test_segments_go_to_the_quarantine_and_come_back(self, store):
        info = created(store, size=12)
        store.append(info, 0, Blocks(b"one,"), HELD)
        for block in (b"two,", b"last"):
            info = info.replace(storage=store.seal(info))
            store.append(info, store.offset(info), Blocks(block), HELD)
        (file,) = store.files(LATER)
        found = store.quarantine(file)
        assert list(store.files(LATER)) == []
        with pytest.raises(UploadGone):
            store.offset(info)
        assert store.restore(found)
        assert content(store, info) == b"one,two,last"
        assert [one.storage.path for one in store.files(LATER)] == [info.storage.path]

    def test_segments_of_an_upload_before_are_not_taken_over(self, store):
        before = created(store, size=12)
        store.append(before, 0, Blocks(b"one,"), HELD)
        sealed = before.replace(storage=store.seal(before))
        store.append(sealed, 4, Blocks(b"two,last"), HELD)
        # Its maker died before it was tidied up, and it was removed by hand.
        Path(store.location(before)).unlink()
        store.create(before)
        store.append(before, 0, Blocks(b"new,"), HELD)
        again = before.replace(storage=store.seal(before))
        assert store.offset(again) == 4
        store.delete(before)
        assert files_below(store.data_dir) == []

    def test_an_upload_that_lacks_a_segment_is_gone(self, store):
        info = created(store, size=12)
        for block in (b"one,", b"two,", b"last"):
            info = info.replace(storage=store.seal(info))
            store.append(info, store.offset(info), Blocks(block), HELD)
        path = Path(store.location(info))
        path.with_name(f".{path.name}.segment2").unlink()
        for ask in (store.offset, store.open, store.seal):
            with pytest.raises(UploadGone):
                ask(info)

    def test_a_move_that_was_cut_off_is_done_again(self, store, monkeypatch):
        class Death(BaseException):
            """As if the process died."""

        def die(*args):
            raise Death

        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"bytes")
        marker_of(path).write_text("3\n")
        (file,) = store.files(LATER)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", die)
            with pytest.raises(Death):
                store.quarantine(file)
        assert store.offset(info) == 3
        assert store.quarantine(file) is not None
        with pytest.raises(UploadGone):
            store.offset(info)
        first, second = store.quarantined()
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", die)
            with pytest.raises(Death):
                store.restore(first)
        assert store.offset(info) == 3
        assert store.discard(first)
        assert store.discard(second)
        assert store.offset(info) == 3

    def test_a_file_system_without_hard_links_has_a_quarantine(self, store, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        info = created(store)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        (file,) = store.files(LATER)
        moved = store.quarantine(file)
        store.create(info)
        assert not store.restore(moved)
        store.delete(info)
        assert store.restore(moved)
        assert content(store, info) == b"bytes"

    def test_what_an_operator_put_beside_the_quarantine_stays(self, store):
        quarantine = store.data_dir / ".tuswsgi" / "quarantine"
        for name in ("mine/a", "2026-02-31T000000Z/a", "note"):
            (quarantine / name).parent.mkdir(parents=True, exist_ok=True)
            (quarantine / name).write_text("mine")
        assert list(store.quarantined()) == []

    def test_a_directory_that_is_gone_has_no_files(self, tmp_path):
        assert list(FileDataStore(tmp_path / "gone").files(LATER)) == []

    @pytest.mark.parametrize(
        "path",
        [
            "..",
            "../secret",
            "/etc/passwd",
            "a/../../secret",
            "a//b",
            "",
            ".hidden",
            "a/.hidden",
            "a\0b",
            "a\\b",
            "a\nb",
            "x" * 256,
        ],
    )
    def test_no_path_leads_out(self, store, path):
        with pytest.raises(UploadNotFound):
            inside(store.data_dir, path)
        info = FileInfo(id="a", storage=Storage(store.type, path))
        if not path:  # an info without a path is found by its id
            return
        for action in (store.offset, store.open, store.delete, store.create, store.location):
            with pytest.raises(UploadNotFound):
                action(info)
        with pytest.raises(UploadNotFound):
            store.append(info, 0, Blocks(b"x"), HELD)

    def test_what_lies_inside(self, store):
        for name in ("a", "a/b", "2024/1/x~y", "ы", "a b", "x" * 255):
            assert inside(store.data_dir, name) == store.data_dir / name

    def test_offsets_have_64_bits(self, store):
        info = created(store)
        path, start = Path(store.location(info)), 2**32 * 3 + 5
        os.truncate(path, start)
        assert store.offset(info) == start
        assert store.append(info, start, Blocks(b"end"), HELD) == start + 3
        assert store.append(info, start + 3, Blocks(b"bad", provisional=True, accepts=False), HELD)
        assert store.append(info, start + 3, Blocks(b"!", provisional=True), HELD) == start + 4
        assert content(store, info, start) == b"end!"

    def test_a_full_disk_keeps_what_fitted(self, store):
        info, part = created(store), self.part(store, LARGE)
        final = self.final(store, part)
        store.append(info, 0, Blocks(b"old"), HELD)
        with files_up_to(1_500_000):
            with pytest.raises(StorageFull):
                store.append(info, 3, Blocks(LARGE), HELD)
            assert store.offset(info) == 1_500_000
            with pytest.raises(StorageFull):
                store.append(info, 1_500_000, Blocks(b"x"), HELD)
            with pytest.raises(StorageFull):
                store.concatenate(final, [part], HELD)
            assert store.offset(final) == 0
        rest = LARGE[1_500_000 - 3 :]
        assert store.append(info, 1_500_000, Blocks(rest), HELD) == 3 + len(LARGE)
        assert content(store, info) == b"old" + LARGE
        store.concatenate(final, [part], HELD)
        assert content(store, final) == LARGE

    def test_a_full_disk_keeps_nothing_provisional(self, store):
        info = created(store)
        store.append(info, 0, Blocks(b"old"), HELD)
        with files_up_to(1_500_000), pytest.raises(StorageFull):
            store.append(info, 3, Blocks(LARGE, provisional=True), HELD)
        assert store.offset(info) == 3
        assert content(store, info) == b"old"

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("function", ["open", "mkdir"])
    def test_without_room_for_a_name_nothing_is_created(self, store, monkeypatch, number, function):
        def fail(*args, **kwargs):
            raise OSError(number, "full")

        info = FileInfo(id="a", storage=Storage(store.type, "new/a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(StorageFull):
                store.create(info)
        store.create(info)

    def test_other_trouble_stays_what_it_is(self, store, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError(errno.EINVAL, "broken")

        info = created(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(OSError, match="broken") as error:
                store.append(info, 0, Blocks(b"x"), HELD)
        assert error.value.errno == errno.EINVAL
        assert store.offset(info) == 0

    def test_it_knows_its_room(self, store):
        state = os.statvfs(store.data_dir)
        assert 0 < store.free_space() <= state.f_blocks * state.f_frsize

    @pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_parts_are_joined_by_hand(self, store, monkeypatch, number):
        def fail(*args, **kwargs):
            raise OSError(number, "not here")

        monkeypatch.setattr(os, "copy_file_range", fail)
        parts = [self.part(store, data) for data in (LARGE, b"end")]
        final = self.final(store, *parts)
        store.concatenate(final, parts, HELD)
        assert content(store, final) == LARGE + b"end"

    def test_a_directory_that_cannot_be_is_said(self, tmp_path):
        (tmp_path / "file").touch()
        for directory in (tmp_path / "file" / "data", tmp_path / "file"):
            with pytest.raises(ConfigurationError, match="data directory"):
                FileDataStore(directory).prepare()


class TestFileDataStoreWithFsync(TestFileDataStore):
    options = {"force_fsync": True}  # noqa: RUF012

    def test_bytes_are_synced_before_they_are_told(self, store, monkeypatch):
        synced = []
        fdatasync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), fdatasync(fd)))
        info = created(store)
        store.append(info, 0, Blocks(b"x"), HELD)
        assert synced
        synced.clear()
        store.offset(info)
        assert synced, "a worker that was killed has not synced what it wrote"

    def test_a_marker_goes_after_what_it_hid(self, store, monkeypatch):
        # Otherwise a power loss could bring the bytes back without the marker.
        info = created(store)
        path = Path(store.location(info))
        path.write_bytes(b"goodunverified")
        marker_of(path).write_text("4\n")
        sizes = []
        fdatasync = os.fdatasync

        def look(fd):
            if marker_of(path).exists():
                sizes.append(os.fstat(fd).st_size)
            fdatasync(fd)

        store.offset(info)
        monkeypatch.setattr(os, "fdatasync", look)
        store.append(info, 4, Blocks(b"!"), HELD)
        assert 4 in sizes


class TestFileDataStoreWithStructure(TestFileDataStore):
    options = {"dir_structure": "{year}/{month}/env[TUSWSGI_TEST_NODE]"}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _node(self, monkeypatch):
        monkeypatch.setenv("TUSWSGI_TEST_NODE", "node-1")

    def test_uploads_stay_where_they_were_created(self, store, tmp_path):
        info = created(store)
        moved = FileDataStore(tmp_path / "data", dir_structure="elsewhere")
        moved.prepare()
        store.append(info, 0, Blocks(b"bytes"), HELD)
        assert content(moved, info) == b"bytes"

    def test_the_directories_are_dates(self, store):
        now = datetime.now(timezone.utc)
        info = created(store)
        assert info.storage.path == f"{now.year}/{now.month}/node-1/{info.id}"
        assert store.location(info) == str(store.data_dir / info.storage.path)

    def test_an_upload_is_created_once(self, store):
        # Another day the same id has another path: ids are unique among records.
        info = created(store)
        with pytest.raises(Exception, match="exists"):
            store.create(info)


@pytest.mark.parametrize(
    ("structure", "path"),
    [
        ("", "id"),
        ("/", "id"),
        ("a/b", "a/b/id"),
        ("/a/", "a/id"),
        ("{year}-{month}-{day}", f"{datetime.now(timezone.utc):%Y-X%m-X%d}/id".replace("X0", "X")),
        ("{env[TUSWSGI_TEST_A]}/x", "value/x/id"),
        ("env[TUSWSGI_TEST_A]", "value/id"),
    ],
)
def test_structures(tmp_path, monkeypatch, structure, path):
    monkeypatch.setenv("TUSWSGI_TEST_A", "value")
    store = FileDataStore(tmp_path, dir_structure=structure)
    store.prepare()
    info = created(store, "id")
    assert info.storage.path == path.replace("X", "")
    assert (tmp_path / info.storage.path).is_file()


def test_hours_and_minutes(tmp_path):
    store = FileDataStore(tmp_path, dir_structure="{hour}/{minute}")
    hour, minute, _ = created(store, "id").storage.path.split("/")
    assert 0 <= int(hour) < 24
    assert 0 <= int(minute) < 60


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"project", "project"),
        ("проект 7".encode(), "проект 7"),
        (b"a.b", "a.b"),
        (b"../../up", "_._.._up"),
        (b"..", "_."),
        (b".hidden", "_hidden"),
        (b"/etc", "_etc"),
        (b"a\\b/c", "a_b_c"),
        (b"a\0b\r\nc", "abc"),
        (b"\0.a", "_a"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b"x" * 500, "x" * 120),
        ("я".encode() * 500, "я" * 60),
        (b"", "_"),
        (None, "_"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_directories_by_metadata(tmp_path, value, name):
    store = FileDataStore(tmp_path, dir_structure="{metadata[my-key]}/{metadata[my-key]}-x")
    store.prepare()
    metadata = Metadata.of({"other": b"other"} | ({} if value is None else {"my-key": value}))
    info = created(store, "id", metadata=metadata)
    assert info.storage.path == f"{name}/{name}-x/id"
    assert (tmp_path / name / f"{name}-x" / "id").is_file()
    assert store.append(info, 0, Blocks(b"x"), HELD) == 1


@pytest.mark.parametrize("structure", ["..", "a/../..", ".hidden", "a//b", "{env[TUSWSGI_UP]}/a"])
def test_structures_that_lead_out_are_mistakes(tmp_path, monkeypatch, structure):
    monkeypatch.setenv("TUSWSGI_UP", "../up")
    with pytest.raises(ConfigurationError, match="dir_structure"):
        FileDataStore(tmp_path, dir_structure=structure).prepare()


DYING = """
import os, signal, sys
from pathlib import Path
from tuswsgi.datastores.file import FileDataStore
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.lockers.base import HELD
from tuswsgi.testing.datastores import Blocks

class Dying(Blocks):
    def read(self, n):
        block = super().read(n)
        if not block:
            os.kill(os.getpid(), signal.SIGKILL)
        return block

directory, path, provisional = sys.argv[1:]
info = FileInfo(id=path.rpartition("/")[2], storage=Storage("file_storage", path))
store = FileDataStore(Path(directory))
store.append(info, 3, Dying(b"lost", provisional=provisional == "True"), HELD)
"""

DYING_JOINER = """
import os, signal, sys
from pathlib import Path
from tuswsgi.datastores.file import FileDataStore, copy_file
from tuswsgi.core.info import FileInfo, Storage
from tuswsgi.lockers.base import HELD

def die_in_the_middle(*args):
    copy_file(*args)
    os.kill(os.getpid(), signal.SIGKILL)

directory, final, part = sys.argv[1:]
sys.modules[FileDataStore.__module__].copy_file = die_in_the_middle
infos = [FileInfo(id="x", size=4, storage=Storage("file_storage", path)) for path in (final, part)]
FileDataStore(Path(directory)).concatenate(infos[0], infos[1:], HELD)
"""


def marker_of(path):
    return path.with_name(f".{path.name}.unverified")


def files_below(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@contextmanager
def files_up_to(size):
    """Let no file of this process grow beyond `size`: a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_modes_are_exact_whatever_the_umask_is(tmp_path):
    store = FileDataStore(tmp_path, dir_structure="{year}", file_mode=0o660, dir_mode=0o770)
    store.prepare()
    before = os.umask(0o077)
    try:
        info = FileInfo("a", size=1)
        path = tmp_path / (store.create(info).path or "")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.parent.stat().st_mode & 0o777 == 0o770
