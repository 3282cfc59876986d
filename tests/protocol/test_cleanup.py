"""What the clean-up removes, and what it must not touch."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from e2e.client import wait_until

from protocol.client import Client, assert_refused, metadata, path_of
from protocol.conftest import Clock, Serve, on_memory
from tuswsgi.core.errors import UploadGone, UploadLocked, UploadNotFound
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, State, made_at, new_id
from tuswsgi.hooks.base import ChangeFileInfo, HookResponse
from tuswsgi.infostores.redis import RedisInfoStore
from tuswsgi.lockers.base import HELD
from tuswsgi.observing.telemetry import bytes_reclaimed, quarantine_changed
from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings, Reason, Removal, TooManyStrays
from tuswsgi.protocol.sweep import Sweeper
from tuswsgi.testing.datastores import Blocks

HOUR, DAY = 3600, 86400


def id_of(url: str) -> str:
    return url.rpartition("/")[2]


def clean_up(client: Client, **options: Any) -> dict[str, Removal]:
    """Do all searches once and return what was removed, by ids."""
    settings = client.tus.config.build(CleanUpSettings)
    searches = CleanUp(client.tus.uploads, settings, **options).searches()
    found = [removal for search in searches for removal in search.removals()]
    assert len({removal.id for removal in found}) == len(found)
    return {removal.id: removal for removal in found}


def reasons(client: Client, **options: Any) -> dict[str, Reason]:
    return {id: removal.reason for id, removal in clean_up(client, **options).items()}


def info_of(client: Client, url: str) -> FileInfo:
    return client.tus.uploads.infos.load(id_of(url))


def leave(client: Client, id: str | None = None) -> FileInfo:
    """Leave bytes as a POST does that is killed in the middle."""
    client.tus.start()
    data = client.tus.uploads.data
    if id is None:
        let_ids_grow()
    info = FileInfo(id=id or new_id())
    info = info.replace(storage=data.create(info))
    data.append(info, 0, Blocks(b"lost"), HELD)
    return info


def let_ids_grow() -> None:
    """Wait until new ids are younger than those that there are: they tell milliseconds."""
    last = made_at(new_id()) or 0.0
    wait_until(lambda: (made_at(new_id()) or 0.0) > last, "the next millisecond")


@contextmanager
def standing(clock: Clock) -> Iterator[None]:
    """Let the server's time of day stand still."""
    now, going = clock(), clock._time
    clock._time = lambda: now - clock.ahead
    yield
    clock._time = going


class TestUnfinished:
    @pytest.fixture
    def client(self, serve: Serve, clock: Clock) -> Client:
        return serve(gc_unfinished_age="1d")

    def test_it_goes_when_nothing_arrives_any_more(self, client: Client, clock: Clock) -> None:
        old, busy, done = client.create(9, b"old"), client.create(9), client.create(3, b"all")
        clock.ahead += DAY * 0.9
        client.append(busy, b"hello", 0)
        assert clean_up(client) == {}
        clock.ahead += DAY * 0.2
        (removal,) = clean_up(client).values()
        assert (removal.reason, removal.id, removal.bytes) == (Reason.UNFINISHED, id_of(old), 3)
        assert removal.age == pytest.approx(DAY * 1.1, abs=HOUR)
        assert_refused(client.head(old), 410)
        assert info_of(client, old).state is State.EXPIRED
        assert client.offset(busy) == 5
        assert client.content(done) == b"all"

    def test_it_stays_without_an_age(self, serve: Serve, clock: Clock) -> None:
        client = serve()
        url = client.create(9, b"old")
        clock.ahead += 10_000 * DAY
        assert clean_up(client) == {}
        assert client.offset(url) == 3

    def test_what_a_client_was_told_of_its_expiry_holds(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_unfinished_age="1d", expiration="3d")
        url = client.create(9, b"old")
        clock.ahead += 2 * DAY
        assert clean_up(client) == {}
        assert client.offset(url) == 3
        clock.ahead += 2 * DAY
        assert reasons(client) == {id_of(url): Reason.EXPIRED}

    def test_one_in_use_stays(self, client: Client, clock: Clock) -> None:
        url = client.create(9, b"old")
        clock.ahead += 2 * DAY
        with client.tus.uploads.locker.lock(id_of(url), pytest.fail):
            assert clean_up(client) == {}
            assert clean_up(client, dry_run=True) == {}
        assert client.offset(url) == 3

    def test_it_is_looked_at_again_under_its_lock(self, client: Client, clock: Clock) -> None:
        urls = sorted(client.create(9, b"old") for _ in range(5))
        clock.ahead += 2 * DAY
        settings = client.tus.config.build(CleanUpSettings)
        unfinished = CleanUp(client.tus.uploads, settings).searches()[1]
        removals = unfinished.removals()
        # All of them were read by now.
        assert next(removals).id == id_of(urls[0])
        client.append(urls[3], b"new", 3)
        client.delete(urls[4])
        assert [removal.id for removal in removals] == [id_of(url) for url in urls[1:3]]
        assert client.offset(urls[3]) == 6

    def test_one_that_is_complete_waits_for_its_hook(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_unfinished_age="1d")
        answers = [HookResponse(reject=True, status=503)]
        client.tus.on("pre-finish")(lambda hook: answers[-1])
        url = client.create(5)
        assert_refused(client.patch(url, b"hello", 0), 503)
        clock.ahead += 2 * DAY
        assert clean_up(client) == {}
        answers.append(HookResponse())
        assert client.head(url).status_code == 200
        assert client.content(url) == b"hello"

    def test_a_final_upload_lives_as_long_as_its_parts(self, client: Client, clock: Clock) -> None:
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        final = path_of(client.final(done, undone))
        clock.ahead += DAY * 0.9
        client.append(undone, b"l", 3)
        clock.ahead += DAY * 0.9
        assert clean_up(client) == {}
        clock.ahead += DAY * 0.2
        assert reasons(client) == {id_of(final): Reason.UNFINISHED}

    def test_a_final_upload_whose_part_is_gone(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_unfinished_age="1d", expiration="3d")
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        final = path_of(client.final(done, undone))
        client.delete(done)
        clock.ahead += 4 * DAY
        assert reasons(client) == {id_of(url): Reason.EXPIRED for url in (final, undone)}


class TestFinished:
    @pytest.fixture
    def client(self, serve: Serve, clock: Clock) -> Client:
        return serve(gc_finished_age="1d")

    def test_it_goes_in_time(self, client: Client, clock: Clock) -> None:
        client.tus.on("pre-finish")(
            lambda hook: HookResponse(reject=True, status=422) if hook.info.size == 4 else None
        )
        finished, unfinished = client.create(5, b"hello"), client.create(9, b"old")
        refused = client.create(4)
        assert client.patch(refused, b"evil", 0).status_code == 422
        clock.ahead += DAY * 0.9
        assert clean_up(client) == {}
        clock.ahead += DAY * 0.2
        young = client.create(5, b"hello")
        removed = clean_up(client)
        assert {id: (removal.reason, removal.bytes) for id, removal in removed.items()} == {
            id_of(finished): (Reason.FINISHED, 5),
            id_of(refused): (Reason.FINISHED, 4),
        }
        assert_refused(client.get(finished), 410)
        assert client.content(young) == b"hello"
        assert client.offset(unfinished) == 3

    @pytest.mark.parametrize("dead", [False, True])
    def test_it_stays_until_its_hooks_are_delivered(
        self, client: Client, clock: Clock, dead: bool
    ) -> None:
        gate, calls = threading.Event(), threading.Semaphore(0)

        @client.tus.on("post-finish")
        def hear(hook: Any) -> None:
            calls.release()
            assert gate.wait(60), "the test has ended"

        infos = client.tus.uploads.infos
        url = client.create(5, b"hello")
        assert calls.acquire(timeout=60)
        client.tus.drain(0.0)
        (event,) = infos.events(id_of(url))
        infos.put_back(replace(event, dead=dead, due_at=1e11))
        clock.ahead += 2 * DAY
        assert clean_up(client) == {}
        assert client.content(url) == b"hello"
        infos.settle(event)
        gate.set()
        assert reasons(client) == {id_of(url): Reason.FINISHED}

    def test_one_whose_file_was_moved_away(self, client: Client, clock: Clock) -> None:
        url = client.create(5, b"hello")
        client.tus.uploads.data.delete(info_of(client, url))
        clock.ahead += 2 * DAY
        (removal,) = clean_up(client).values()
        assert removal.bytes == 0

    def test_it_stays_without_an_age(self, serve: Serve, clock: Clock) -> None:
        client = serve()
        url = client.create(5, b"hello")
        clock.ahead += 10_000 * DAY
        assert clean_up(client) == {}
        assert client.content(url) == b"hello"


class TestPartial:
    def test_parts_have_an_age_of_their_own(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_partial_age="2d", gc_unfinished_age="1d", gc_finished_age="1d")
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        clock.ahead += DAY * 1.5
        assert clean_up(client) == {}
        clock.ahead += DAY
        assert reasons(client) == dict.fromkeys(map(id_of, (done, undone)), Reason.PARTIAL)

    def test_parts_stay_without_an_age(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_unfinished_age="1d", gc_finished_age="1d")
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        assert client.offset(done) == 5
        assert client.offset(undone) == 3

    def test_what_a_final_upload_waits_for_stays(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_partial_age="1d")
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        final = path_of(client.final(done, undone))
        clock.ahead += 3 * DAY
        assert clean_up(client) == {}
        client.append(undone, b"ld", 3)
        assert client.content(final) == b"helloworld"
        assert reasons(client) == {id_of(done): Reason.PARTIAL}
        clock.ahead += 2 * DAY
        assert reasons(client) == {id_of(undone): Reason.PARTIAL}
        assert client.content(final) == b"helloworld"


class TestTombstones:
    def test_they_are_forgotten_in_time(self, serve: Serve, clock: Clock) -> None:
        client = serve()
        url = client.create(5)
        client.delete(url)
        clock.ahead += DAY * 6.9
        assert clean_up(client) == {}
        assert_refused(client.head(url), 410)
        clock.ahead += DAY * 0.2
        assert reasons(client, dry_run=True) == {id_of(url): Reason.TOMBSTONE}
        assert_refused(client.head(url), 410)
        assert reasons(client) == {id_of(url): Reason.TOMBSTONE}
        assert_refused(client.head(url), 404)

    def test_they_stay_for_ever_if_that_is_wanted(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_tombstone_age="")
        url = client.create(5)
        client.delete(url)
        clock.ahead += 10_000 * DAY
        assert clean_up(client) == {}
        assert_refused(client.head(url), 410)

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_one_with_events_stays(self, serve: Serve, clock: Clock, dry_run: bool) -> None:
        client = serve()
        client.tus.on("post-terminate")(print)
        client.tus.start()
        client.tus.drain()
        url = client.create(5)
        client.delete(url)
        infos = client.tus.uploads.infos
        (event,) = infos.events(id_of(url))
        assert event.type is HookType.POST_TERMINATE
        clock.ahead += 8 * DAY
        assert clean_up(client, dry_run=dry_run) == {}
        infos.put_back(replace(event, dead=True))
        assert clean_up(client, dry_run=dry_run) == {}
        infos.settle(event)
        assert reasons(client, dry_run=dry_run) == {id_of(url): Reason.TOMBSTONE}


class TestLostData:
    def test_a_record_whose_bytes_are_lost_goes_after_the_grace(
        self, serve: Serve, clock: Clock
    ) -> None:
        client = serve()
        lost, there = client.create(9, b"old"), client.create(9, b"old")
        client.tus.uploads.data.delete(info_of(client, lost))
        clock.ahead += DAY * 0.9
        assert clean_up(client) == {}
        clock.ahead += DAY * 0.2
        assert reasons(client) == {id_of(lost): Reason.DATA_LOST}
        assert client.offset(there) == 3

    def test_where_nothing_is_there_the_store_is_away(self, serve: Serve, clock: Clock) -> None:
        client = serve()
        uploads = client.tus.uploads
        urls = [client.create(9, b"old") for _ in range(3)]
        for url in urls:
            uploads.data.delete(info_of(client, url))
        clock.ahead += 2 * DAY
        assert clean_up(client) == {}
        assert {info_of(client, url).state for url in urls} == {State.RECEIVING}


class TestStrays:
    """Bytes that no record tells of."""

    @pytest.fixture
    def client(self, serve: Serve, clock: Clock) -> Client:
        client = serve()
        client.create(5, b"known")  # an upload from before
        let_ids_grow()
        return client

    def is_there(self, client: Client, info: FileInfo) -> bool:
        try:
            return client.tus.uploads.data.offset(info) == 4
        except UploadGone:
            return False

    def test_they_go_to_the_quarantine_after_the_grace(
        self, client: Client, clock: Clock, backends: dict[str, str]
    ) -> None:
        info = leave(client)
        client.create(5, b"later")
        clock.ahead += DAY
        # A POST that still runs may have been silent for a minute.
        assert clean_up(client) == {}
        assert self.is_there(client, info)
        clock.ahead += 120
        assert reasons(client, dry_run=True) == {info.id: Reason.NO_RECORD}
        assert self.is_there(client, info)
        if backends["storage"] == "memory-storage":
            assert clean_up(client) == {}
            assert self.is_there(client, info)  # it is gone with the process
            return
        (removal,) = clean_up(client).values()
        assert (removal.reason, removal.id, removal.bytes) == (Reason.NO_RECORD, info.id, 4)
        assert not self.is_there(client, info)

    def test_none_without_a_grace(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_grace="")
        client.create(5, b"known")
        info = leave(client)
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        assert self.is_there(client, info)

    def test_what_belongs_to_uploads_stays(self, client: Client, clock: Clock) -> None:
        @client.tus.on("pre-create")
        def choose(hook: Any) -> HookResponse | None:
            path = hook.info.metadata.text("path")
            if path is None:
                return None
            change = ChangeFileInfo(f"chosen-{hook.info.id}", path=path.format(id=hook.info.id))
            return HookResponse(change=change)

        def chosen(path: str) -> str:
            return client.create(9, b"mine", Upload_Metadata=metadata(path=path))

        urls = [client.create(9, b"mine"), client.create(4, b"mine")]
        urls += [
            chosen("report.pdf"),
            chosen("a/b/{id}"),
            chosen(new_id()),
            chosen("c/" + "0" * 32),
        ]
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        for url in urls:
            assert client.offset(url) == 4

    def test_what_this_server_did_not_name_stays(self, client: Client, clock: Clock) -> None:
        names = ["report.pdf", "0" * 32, "f" * 32, "a" * 36, "chosen-by-a-hook"]
        infos = [leave(client, id) for id in names]
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        assert all(self.is_there(client, info) for info in infos)

    def test_an_info_store_that_knows_nothing_makes_no_strays(
        self, serve: Serve, clock: Clock
    ) -> None:
        # As it is after the info store was exchanged for an empty one.
        client = serve()
        info = leave(client)
        client.create(5, b"later")
        # A record that was taken over from another server, whose ids tell no time.
        client.tus.uploads.infos.create(FileInfo(id="0" * 32, created_at=clock()))
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        assert self.is_there(client, info)

    def test_an_info_store_that_forgets_makes_no_strays(self, client: Client, clock: Clock) -> None:
        info = leave(client)
        client.tus.uploads.infos.lifetime = 3600.0
        clock.ahead += 100 * DAY
        assert clean_up(client) == {}
        assert self.is_there(client, info)

    def test_a_redis_that_forgets_says_so(self) -> None:
        assert RedisInfoStore("redis://localhost", redis_info_expiration=60.0).lifetime == 60.0
        assert RedisInfoStore("redis://localhost").lifetime is None

    def test_one_in_use_stays(self, client: Client, clock: Clock) -> None:
        info = leave(client)
        clock.ahead += 2 * DAY
        with client.tus.uploads.locker.lock(info.id, pytest.fail):
            assert clean_up(client) == {}
        assert self.is_there(client, info)

    def test_bytes_of_a_tombstone_go(self, client: Client, clock: Clock) -> None:
        url = client.create(9, b"lost")
        info = info_of(client, url)
        client.delete(url)
        info = leave(client, info.id)
        clock.ahead += 2 * DAY
        assert reasons(client) == {info.id: Reason.LEFT_OVER}
        assert not self.is_there(client, info)

    def test_what_is_left_of_an_upload_that_was_chosen_goes_too(
        self, client: Client, clock: Clock
    ) -> None:
        client.tus.on("pre-create")(lambda hook: HookResponse(change=ChangeFileInfo(id="chosen")))
        client.delete(client.create(9, b"old"))
        left, stranger = leave(client, "chosen"), leave(client, "stranger")
        clock.ahead += 2 * DAY
        assert reasons(client) == {"chosen": Reason.LEFT_OVER}
        assert not self.is_there(client, left)
        assert self.is_there(client, stranger)

    def test_a_chosen_path_is_free_again_when_its_upload_was_not_removed_whole(
        self, serve: Serve, options: dict[str, Any], clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = serve(storage="file-storage")
        change = ChangeFileInfo(path="reports/today")
        client.tus.on("pre-create")(lambda hook: HookResponse(change=change))
        url = client.create(5, b"hello")
        with monkeypatch.context() as patch:
            patch.setattr(client.tus.uploads.data, "delete", lambda info: None)  # it dies here
            client.delete(url)
        assert client.post(5).status_code == 409
        clock.ahead += 2 * DAY
        assert reasons(client) == {"today": Reason.LEFT_OVER}
        assert client.content(client.create(3, b"new")) == b"new"

    def test_temporary_files_go(self, serve: Serve, options: dict[str, Any], clock: Clock) -> None:
        client = serve(storage="file-storage")
        url = client.create(9, b"old")
        directory = Path(options["data_dir"])
        left = directory / f".{id_of(url)}.concat-0123456789abcdef"
        left.write_bytes(b"half")
        marker, stale = (directory / f".{name}.unverified" for name in (id_of(url), "not an id"))
        for path in (marker, stale):
            path.write_text("0\n")
        clock.ahead += DAY * 0.9
        assert clean_up(client) == {}
        clock.ahead += DAY * 0.2
        assert {id: removal.bytes for id, removal in clean_up(client).items()} == {
            id_of(url): 4,
            "not an id": 2,
        }
        assert not left.exists()
        assert not stale.exists()
        assert marker.exists()


@pytest.mark.parametrize("backends", ["file"], indirect=True)
class TestQuarantine:
    """Where bytes without a record wait for who misses them."""

    @pytest.fixture
    def client(self, serve: Serve, clock: Clock) -> Client:
        client = serve()
        client.create(5, b"known")
        let_ids_grow()
        return client

    @pytest.fixture
    def quarantine(self, options: dict[str, Any]) -> Path:
        return Path(options["data_dir"]) / ".tuswsgi" / "quarantine"

    def files(self, quarantine: Path) -> list[Path]:
        return [path for path in quarantine.rglob("*") if path.is_file()]

    def lose(self, client: Client, *urls: str) -> list[FileInfo]:
        """Go back to records that do not know of these uploads."""
        infos = [info_of(client, url) for url in urls]
        with closing(self.records(client)) as records, records:
            for info in infos:
                records.execute("DELETE FROM tuswsgi_uploads WHERE id = ?", (info.id,))
        return infos

    def records(self, client: Client) -> sqlite3.Connection:
        path = client.tus.uploads.infos.info_db_dsn.removeprefix("sqlite:///")  # type: ignore[attr-defined]
        return sqlite3.connect(path, timeout=60)

    def test_it_says_where_they_are(
        self, client: Client, clock: Clock, quarantine: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        info = leave(client)
        client.create(5, b"later")
        clock.ahead += 2 * DAY
        clean_up(client)
        (path,) = self.files(quarantine)
        assert path.name == info.id
        assert f"{info.id} (4 bytes) has no record: it was moved to {path}" in caplog.text
        assert clean_up(client) == {}

    def test_they_go_after_an_age_of_their_own(
        self, client: Client, clock: Clock, quarantine: Path
    ) -> None:
        info = leave(client)
        client.create(5, b"later")
        clock.ahead += 100 * DAY
        assert reasons(client) == {info.id: Reason.NO_RECORD}
        clock.ahead += 29 * DAY
        assert clean_up(client) == {}
        clock.ahead += 2 * DAY
        assert reasons(client, dry_run=True) == {info.id: Reason.QUARANTINE}
        assert len(self.files(quarantine)) == 1
        (removal,) = clean_up(client).values()
        assert (removal.reason, removal.bytes) == (Reason.QUARANTINE, 4)
        assert removal.age == pytest.approx(31 * DAY, abs=HOUR)
        assert self.files(quarantine) == []

    def test_they_stay_there_without_an_age(
        self, serve: Serve, clock: Clock, quarantine: Path
    ) -> None:
        client = serve(gc_quarantine_age="")
        client.create(5, b"known")
        leave(client)
        client.create(5, b"later")
        clock.ahead += 2 * DAY
        clean_up(client)
        clock.ahead += 10_000 * DAY
        assert clean_up(client) == {}
        assert len(self.files(quarantine)) == 1

    def test_what_is_younger_than_all_records_stays(self, client: Client, clock: Clock) -> None:
        # As it is where the records are those of a backup.
        let_ids_grow()
        (info,) = self.lose(client, client.create(9, b"mine"))
        clock.ahead += 10 * DAY
        assert clean_up(client, dry_run=True) == clean_up(client) == {}
        assert client.tus.uploads.data.offset(info) == 4
        removed = reasons(client, quarantine_many=True)
        assert removed == {info.id: Reason.NO_RECORD}

    @pytest.mark.parametrize("body", [b"hello", b"hello world"], ids=["unfinished", "finished"])
    def test_they_come_back_with_their_records(
        self, client: Client, clock: Clock, quarantine: Path, body: bytes
    ) -> None:
        url = client.create(11, body)
        client.create(9, b"later")
        (info,) = self.lose(client, url)
        clock.ahead += 2 * DAY
        assert reasons(client) == {info.id: Reason.NO_RECORD}
        client.tus.uploads.infos.create(info)
        assert clean_up(client, dry_run=True).keys() <= {info.id}
        assert clean_up(client) == {}
        client.append(url, b" world"[len(body) - 5 :], len(body))
        assert client.content(url) == b"hello world"
        assert self.files(quarantine) == []

    def test_a_record_that_comes_at_the_last_moment(
        self, client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = client.create(5, b"hello")
        client.create(5, b"later")
        (info,) = self.lose(client, url)
        uploads = client.tus.uploads
        move = uploads.data.quarantine

        def write_and_move(place: Any) -> Any:
            uploads.infos.create(info)
            return move(place)

        monkeypatch.setattr(uploads.data, "quarantine", write_and_move)
        clock.ahead += 2 * DAY
        assert clean_up(client) == {}
        assert client.content(url) == b"hello"

    def test_so_many_that_records_must_be_missing(
        self, client: Client, clock: Clock, quarantine: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        urls = [client.create(3, b"old") for _ in range(11)]
        client.create(5, b"later")
        self.lose(client, *urls)
        clock.ahead += 2 * DAY
        with pytest.raises(TooManyStrays, match=r"At least 11 .* 2 uploads .*--quarantine-many"):
            clean_up(client)
        Sweeper(client.tus.uploads).sweep()
        assert caplog.text.count("--quarantine-many") == 1
        assert self.files(quarantine) == []
        assert len(clean_up(client, quarantine_many=True, dry_run=True)) == 11
        assert len(clean_up(client, quarantine_many=True)) == 11
        assert {path.name for path in self.files(quarantine)} == set(map(id_of, urls))

    def test_some_are_nothing_strange(self, client: Client, clock: Clock, quarantine: Path) -> None:
        urls = [client.create(3, b"old") for _ in range(10)]
        client.create(5, b"later")
        self.lose(client, *urls)
        clock.ahead += 2 * DAY
        assert len(clean_up(client)) == len(self.files(quarantine)) == 10

    def test_a_share_of_many_is_nothing_strange(
        self, client: Client, clock: Clock, quarantine: Path
    ) -> None:
        infos = client.tus.uploads.infos
        urls = [client.create(3, b"old") for _ in range(12)]
        for _ in range(1200):
            info = FileInfo(id=new_id(), state=State.FINISHED, created_at=clock())
            infos.create(info.replace(finished_at=clock()))
        self.lose(client, *urls)
        clock.ahead += 2 * DAY
        assert len(clean_up(client)) == len(self.files(quarantine)) == 12

    def test_what_the_operator_put_back_is_an_upload_again(
        self, client: Client, clock: Clock, quarantine: Path, options: dict[str, Any]
    ) -> None:
        url = client.create(5, b"hello")
        client.create(5, b"later")
        (info,) = self.lose(client, url)
        clock.ahead += 2 * DAY
        clean_up(client)
        (path,) = self.files(quarantine)
        path.rename(Path(options["data_dir"]) / info.id)
        client.tus.uploads.infos.create(info)
        assert clean_up(client) == {}
        assert client.content(url) == b"hello"

    def test_bytes_in_another_place_than_the_removed_upload(
        self, client: Client, clock: Clock
    ) -> None:
        info = leave(client)
        later = client.create(5, b"later")
        other = info.replace(storage=info_of(client, later).storage, created_at=clock())
        infos = client.tus.uploads.infos
        infos.create(other)
        infos.delete(other, [], state=State.TERMINATED, now=clock())
        clock.ahead += 2 * DAY
        assert reasons(client) == {info.id: Reason.NO_RECORD}

    def test_changes_are_told(self, client: Client, clock: Clock) -> None:
        told: list[str] = []

        def hear(tus: object, action: str) -> None:
            if tus is client.tus:
                told.append(action)

        url = client.create(5, b"hello")
        leave(client)
        client.create(5, b"later")
        (info,) = self.lose(client, url)
        clock.ahead += 2 * DAY
        with quarantine_changed.connected_to(hear):
            clean_up(client, dry_run=True)
            assert told == []
            clean_up(client)
            client.tus.uploads.infos.create(info)
            clock.ahead += 31 * DAY
            clean_up(client)
        assert sorted(told) == ["discarded", "put back", "quarantined", "quarantined"]


class TestTelling:
    @pytest.fixture
    def client(self, serve: Serve, clock: Clock) -> Client:
        return serve(gc_unfinished_age="1d")

    def test_what_was_removed_is_logged(
        self, client: Client, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "tuswsgi")
        url = client.create(9, b"old")
        clock.ahead += 2 * DAY
        with standing(clock):
            (removal,) = clean_up(client).values()
        age = round(removal.age)
        line = f"Removed {id_of(url)} (unfinished): {age} s old, 3 bytes"
        assert [record.levelno for record in caplog.records if record.getMessage() == line] == [
            logging.INFO
        ]

    def test_reclaimed_bytes_are_told(self, client: Client, clock: Clock) -> None:
        told: list[int] = []

        def hear(tus: object, size: int) -> None:
            if tus is client.tus:
                told.append(size)

        client.create(9, b"old")
        gone = client.create(9)
        client.delete(gone)
        leave(client, id_of(gone))
        young = client.create(9, b"young")
        clock.ahead += 2 * DAY
        client.append(young, b"x", 5)
        with bytes_reclaimed.connected_to(hear):
            clean_up(client, dry_run=True)
            assert told == []
            clean_up(client)
        assert sorted(told) == [3, 4]

    def test_removals_are_told_to_hooks(self, client: Client, clock: Clock) -> None:
        heard: list[Any] = []
        client.tus.on("post-terminate")(heard.append)
        url = client.create(9, b"old")
        clock.ahead += 2 * DAY
        clean_up(client)
        wait_until(lambda: heard, "the hook")
        assert heard[0].info.id == id_of(url)
        assert heard[0].request == RequestInfo()

    def test_a_dry_run_removes_nothing(self, serve: Serve, clock: Clock) -> None:
        client = serve(gc_unfinished_age="1d", gc_finished_age="1d", expiration="")
        urls = [client.create(9, b"old"), client.create(3, b"all")]
        before = list(client.tus.uploads.infos.list())
        clock.ahead += 2 * DAY
        assert set(clean_up(client, dry_run=True)) == set(map(id_of, urls))
        assert list(client.tus.uploads.infos.list()) == before
        assert [client.offset(url) for url in urls] == [3, 3]


class TestLeader:
    """One process of all sweeps; here they are threads."""

    @pytest.fixture
    def client(self, serve: Serve) -> Client:
        client = serve(expiration="1d", gc_interval="1s")
        client.create(5)
        return client

    def lead(self, client: Client) -> tuple[Sweeper, threading.Thread]:
        sweeper = Sweeper(client.tus.uploads, client.tus.config.build(CleanUpSettings))
        thread = threading.Thread(target=sweeper.run, daemon=True)
        thread.start()
        return sweeper, thread

    def test_another_one_follows(self, client: Client, clock: Clock) -> None:
        sweepers = [self.lead(client) for _ in range(3)]
        for sweeper, thread in sweepers:
            url = client.create(9)
            clock.ahead += DAY + 1
            wait_until(lambda url=url: self.is_expired(client, url), "a sweep")  # type: ignore[misc]
            sweeper.stop()
            thread.join(60)
            assert not thread.is_alive()
        with client.tus.uploads.locker.try_lock("tuswsgi-sweep"):
            pass

    def test_the_leader_keeps_others_away(self, client: Client, clock: Clock) -> None:
        url = client.create(9)
        clock.ahead += DAY + 1
        sweeper, thread = self.lead(client)
        wait_until(lambda: self.is_expired(client, url), "a sweep")
        second = Sweeper(client.tus.uploads)
        with pytest.raises(UploadLocked):
            second.lead()
        sweeper.stop()
        thread.join(60)
        assert self.is_free(client)

    @on_memory
    def test_one_that_lost_its_lease_is_followed(
        self,
        serve: Serve,
        options: dict[str, Any],
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        database = Path(options["data_dir"]) / "locks.sqlite3"
        client = serve(
            storage="file-storage",
            info_storage="db-info-storage",
            locker="db-locker",
            locker_dsn=f"sqlite:///{database}",
            lock_lease="2s",
            expiration="1d",
            gc_interval="1h",
        )
        url = client.create(5)
        clock.ahead += DAY + 1
        sweeper, thread = self.lead(client)
        wait_until(lambda: self.is_expired(client, url), "a leader")
        assert not self.is_free(client)
        with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
            connection.execute("UPDATE tuswsgi_locks SET token = 'a.b.c', ends_at = 0")
        # Another one can lead when it has seen that, long before it would sweep again.
        wait_until(lambda: self.is_free(client), "the end of the leader")
        assert "The sweep ended and is tried again later" in caplog.text
        sweeper.stop()
        thread.join(60)

    def is_expired(self, client: Client, url: str) -> bool:
        return info_of(client, url).state is State.EXPIRED

    def is_free(self, client: Client) -> bool:
        try:
            with client.tus.uploads.locker.try_lock("tuswsgi-sweep"):
                return True
        except UploadLocked:
            return False


def test_an_unknown_upload_is_not_removed_by_its_operator(client: Client) -> None:
    uploads = client.tus.uploads
    url = client.create(9, b"old")
    assert uploads.remove(id_of(url)).state is State.TERMINATED
    with pytest.raises(UploadGone):
        uploads.remove(id_of(url))
    for id in (new_id(), "../x"):
        with pytest.raises(UploadNotFound):
            uploads.remove(id)
