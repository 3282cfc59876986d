"""The info stores of this package, held to the contract, alone and among processes."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from threading import Thread

import pytest

from tuswsgi.connections.databases import connect
from tuswsgi.core.errors import (
    ConfigurationError,
    StorageFull,
    Unavailable,
    UploadExists,
    UploadNotFound,
)
from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores import record
from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.infostores import InfoStoreContract
from tuswsgi.testing.records import event, full, upload


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
        # Another spelling of the directory is another connection.
        yield from self._prepared(f"{tmp_path}/.")

    def _prepared(self, directory):
        store = self.make(directory)
        store.prepare()
        yield store
        store.close()


class TestFileInfoStore(Shared):
    def make(self, directory):
        return FileInfoStore(f"{directory}/info")

    @pytest.fixture
    def directory(self, tmp_path):
        return tmp_path / "info"

    @pytest.fixture
    def fill(self, monkeypatch):
        def fail(*args):
            raise OSError(errno.ENOSPC, "full")

        return lambda: monkeypatch.setattr(os, "link", fail)

    def test_foreign_entries_are_skipped(self, store, directory, caplog):
        info = upload()
        store.create(info)
        (directory / "empty.info").touch()
        (directory / "text.info").write_text("no record")
        (directory / "array.info").write_text("[]")
        (directory / "other.info").write_text('{"id": "other", "offset": 0}')
        (directory / "renamed.info").write_bytes((directory / f"{info.id}.info").read_bytes())
        (directory / "strange name.info").write_text("{}")
        (directory / "folder.info").mkdir()
        (directory / "note.txt").touch()
        assert list(store.list()) == [info]
        assert list(store.expired(1.0)) == []
        skipped = {"empty", "text", "array", "other", "renamed"}
        assert {name for name in skipped if f"{name}.info" in caplog.text} == skipped
        with pytest.raises(record.CorruptRecord):
            store.load("text")

    @pytest.mark.parametrize("id", ["..", "../info/a", "a/b", ".waiting", "", "a\0b"])
    def test_ids_cannot_leave_the_directory(self, store, id):
        with pytest.raises(UploadNotFound):
            store.load(id)
        with pytest.raises(UploadNotFound):
            store.create(upload(id))
        assert list(store.finals_waiting_for(id)) == []

    def test_markers_and_temporary_files_are_removed(self, store, directory):
        final = upload(is_final=True, partial_uploads=("a", "b", "a"), state=State.WAITING)
        store.create(final)
        assert sorted(path.name for path in (directory / ".waiting").iterdir()) == ["a", "b"]
        store.save(replace(final, state=State.RECEIVING))
        assert sorted(path.name for path in directory.rglob("*")) == [
            ".pending",
            ".waiting",
            f"{final.id}.info",
        ]

    def test_a_waiting_marker_without_a_record_is_ignored(self, store, directory):
        (directory / ".waiting" / "part").mkdir()
        (directory / ".waiting" / "part" / "final").touch()
        assert list(store.finals_waiting_for("part")) == []

    def test_the_marker_is_removed_with_the_last_event(self, store, directory):
        first = event(info := upload(), transport="http")
        store.create(info, [first])
        info = store.save(info, [second := event(info, sequence=1, transport="http")])
        store.put_back(replace(second, dead=True))
        store.settle(first)
        assert [path.name for path in (directory / ".pending").iterdir()] == [info.id]
        store.settle(second)
        assert list((directory / ".pending").iterdir()) == []

    def test_the_marker_of_a_concurrent_event_stays(self, store, other, directory):
        first = event(info := upload(), transport="http")
        second = event(info, sequence=1, transport="http")
        writer = Thread(target=other.save, args=(info, [second]))

        class Slow(FileInfoStore):
            def _set_marker(self, entry):
                # The last event is removed while a new one is written.
                writer.start()
                writer.join(0.3)
                super()._set_marker(entry)

        store.create(info, [first])
        Slow(directory).settle(first)
        writer.join()
        assert list(store.claim("a", 1.0, 2.0)) == [second]

    def test_only_records_that_are_due_are_read(self, store, directory, caplog):
        events = [event(info, transport="http") for info in (upload(), upload(), upload())]
        for told in events:
            store.create(upload(told.upload), [told])
        late, dead, due = events
        store.put_back(replace(late, due_at=50.0))
        store.put_back(replace(dead, dead=True))
        for told in (late, dead):
            (directory / f"{told.upload}.info").write_text("no record")
        assert list(store.claim("a", 49.9, 60.0)) == [due]
        assert caplog.text == ""
        for _ in range(3):
            assert list(store.claim("a", 50.0, 60.0)) == []
        assert caplog.text.count("Skipping") == 1

    def test_a_marker_that_is_too_early_is_corrected(self, store, directory):
        told = event(info := upload(), transport="http", due_at=50.0)
        store.create(info, [told])
        store.create(info := upload())
        for path in (directory / ".pending" / told.upload, directory / ".pending" / info.id):
            path.touch()
            os.utime(path, (0, 0))
        assert list(store.claim("a", 49.0, 60.0)) == []
        assert [path.name for path in (directory / ".pending").iterdir()] == [told.upload]
        assert (directory / ".pending" / told.upload).stat().st_mtime == 50.0
        assert list(store.claim("a", 50.0, 60.0)) == [told]

    def test_a_pending_marker_without_a_record_is_ignored_and_removed_later(
        self, store, directory, monkeypatch
    ):
        for name in ("unknown", "strange name"):
            (directory / ".pending" / name).touch()
        assert list(store.claim("a", time.time() + 1, time.time() + 2)) == []
        assert list(store.undelivered(dead=False)) == []
        # The upload may be about to be created.
        store.prepare()
        assert len(list((directory / ".pending").iterdir())) == 2
        monkeypatch.setattr("tuswsgi.infostores.file._ABANDONED", -1.0)
        store.prepare()
        assert list((directory / ".pending").iterdir()) == []

    def test_old_temporary_files_are_removed(self, store, directory):
        old, young = directory / ".a.00000000.tmp", directory / ".b.00000000.tmp"
        old.touch()
        young.touch()
        os.utime(old, (time.time() - 7200, time.time() - 7200))
        store.prepare()
        assert not old.exists()
        assert young.exists()

    @pytest.mark.parametrize(
        ("number", "error"),
        [(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, Unavailable)],
    )
    def test_disk_errors_are_translated(self, store, directory, monkeypatch, number, error):
        def fail(*args):
            raise OSError(number, "broken")

        info = upload()
        store.create(info)
        for name in ("link", "replace"):
            monkeypatch.setattr(os, name, fail)
        with pytest.raises(error):
            store.create(upload())
        with pytest.raises(error):
            store.save(info)
        assert list(store.list()) == [info]

    def test_an_error_after_the_write_is_not_reported_as_no_room(self, store, monkeypatch):
        unlink = os.unlink

        def fail(path):
            unlink(path)
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "unlink", fail)
        with pytest.raises(Unavailable):
            store.create(info := upload())
        assert store.load(info.id) == info

    def test_a_link_that_nfs_repeats_is_no_conflict(self, store, monkeypatch):
        link = os.link

        def repeat(source, target):
            link(source, target)
            link(source, target)

        store.create(other := upload())
        monkeypatch.setattr(os, "link", repeat)
        store.create(info := upload())
        assert store.load(info.id) == info
        with pytest.raises(UploadExists):
            store.create(other)

    def test_an_unusable_directory_is_reported(self, tmp_path):
        (tmp_path / "info").write_text("a file")
        with pytest.raises(ConfigurationError, match="cannot be used"):
            self.make(tmp_path).prepare()


class TestDurableFileInfoStore(Shared):
    def make(self, directory):
        return FileInfoStore(f"{directory}/info", force_fsync=True)


class TestSqliteInfoStore(Shared):
    force_fsync = False

    def make(self, directory):
        return SqlInfoStore(f"sqlite:///{directory}/db/info.sqlite3", force_fsync=self.force_fsync)

    @pytest.fixture
    def fill(self, store):
        def limit(database):
            (pages,) = database.execute_sql("PRAGMA page_count").fetchone()
            database.execute_sql(f"PRAGMA max_page_count = {pages}")

        return lambda: store._connection.write(limit)

    def test_commits_are_as_durable_as_configured(self, store):
        store.create(upload())
        for run in (store._connection.read, store._connection.write):
            pragma = run(lambda database: database.execute_sql("PRAGMA synchronous").fetchone())
            assert pragma == ((2,) if self.force_fsync else (1,))

    def test_tables_of_a_newer_version_are_left_alone(self, store):
        store._connection.write(
            lambda database: database.execute_sql("UPDATE tuswsgi_schema SET version = 99")
        )
        with pytest.raises(ConfigurationError, match="version 99"):
            store.prepare()

    def test_work_does_not_grow_with_the_number_of_events(self, store):
        def work(count):
            for _ in range(count):
                info = upload()
                store.create(info, [event(info, transport="http", due_at=50.0)])
                store.save(info, [event(info, sequence=1, transport="http")])
            steps = 0

            def step():
                nonlocal steps
                steps += 1

            for run in (store._connection.read, store._connection.write):
                run(lambda database: database.connection().set_progress_handler(step, 10))
            told = event(info := upload(), transport="http")
            store.create(info, [told])
            claimed = store.claim("a", 10.0, 20.0, transport="http")
            assert list(claimed) == [told]
            assert list(store.claim("a", 10.0, 20.0)) == []
            assert list(store.claim("a", 10.0, 20.0, upload=info.id)) == []
            assert list(store.events(info.id)) == [told]
            store.renew("a", 30.0)
            store.put_back(replace(told, due_at=12.0))
            store.settle(told)
            for run in (store._connection.read, store._connection.write):
                run(lambda database: database.connection().set_progress_handler(None, 10))
            return steps

        work(1)
        few = work(1)
        assert work(300) < 2 * few

    def test_events_of_a_failed_write_are_gone(self, store, monkeypatch):
        info = upload()
        store.create(info)
        bad = event(info, payload={"not JSON": object()})
        with pytest.raises(TypeError):
            store.save(replace(info, offset=1), [event(info), bad])
        assert store.load(info.id) == info
        assert list(store.events(info.id)) == []

    def test_a_store_without_tables_is_unavailable(self, tmp_path, caplog):
        store = self.make(tmp_path)
        (tmp_path / "db").mkdir()
        with pytest.raises(Unavailable) as caught:
            store.load("a")
        assert "no such table" in caplog.text
        assert "table" not in caught.value.message
        store.close()

    def test_one_connection_of_each_kind_is_open(self, store, tmp_path):
        self.test_many_uploads_are_saved_at_once(store)
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        files = [os.readlink(link) for link in links if os.path.islink(link)]
        assert files.count(str(tmp_path / "db" / "info.sqlite3")) == 2
        connect(store.info_db_dsn, force_fsync=self.force_fsync).close()
        assert list(store.list())


class TestDurableSqliteInfoStore(TestSqliteInfoStore):
    force_fsync = True


class TestRecord:
    def test_unknown_fields_are_ignored_and_missing_ones_have_defaults(self):
        data = {"id": "a", "offset": 3, "state": "receiving", "sequence": 1, "colour": "red"}
        assert record.load(data) == FileInfo("a", offset=3, sequence=1)
        info = full()
        newer = {**record.dump(info), "storage": {**record.dump(info)["storage"], "zone": 1}}
        assert record.load(newer) == info

    @pytest.mark.parametrize(
        "text",
        ["", "{", "null", "7", '{"id": "a"}', '{"id": 1, "state": "gone"}', "\ud800", b"\xff"],
    )
    def test_invalid_records_are_refused(self, text):
        with pytest.raises(record.CorruptRecord):
            record.load(record.decode(text))

    def test_invalid_events_are_refused(self):
        for data in ({}, {"id": "a", "type": "post-nothing"}):
            with pytest.raises(record.CorruptRecord):
                record.load_event(data)
