"""The contract of ``RecordStore`` as tests, a part of ``InfoStoreContract``.

Each test holds a store to a sentence of the documentation of ``RecordStore``. They do not
test what happens when processes die: that needs processes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tuswsgi.core.errors import InfoConflict, StorageFull, UploadExists, UploadNotFound
from tuswsgi.core.info import MAX_SIZE, FileInfo, Metadata, State, new_id
from tuswsgi.infostores.base import InfoStore
from tuswsgi.testing.records import event, full, together, upload


class RecordStoreContract:
    """Tests of the records, with the fixtures of ``InfoStoreContract``."""

    def test_load_returns_what_was_created(self, store: InfoStore) -> None:
        for info in (upload(), full()):
            store.create(info)
            assert store.load(info.id) == info

    def test_an_unknown_id_is_not_found(self, store: InfoStore) -> None:
        with pytest.raises(UploadNotFound):
            store.load(new_id())
        with pytest.raises(UploadNotFound):
            store.save(upload())
        with pytest.raises(UploadNotFound):
            store.delete(upload(), [], state=State.TERMINATED, now=3.0)

    def test_similar_ids_do_not_collide(self, store: InfoStore) -> None:
        ids = ["a", "a*", "a%2A", "a%2a", "a:b", "a;b,c", "a@b=c+d", "'a'", "(a)!$", "*", "%s"]
        whole = upload("*;whole", state=State.WAITING, is_final=True, partial_uploads=tuple(ids))
        for id in ids:
            store.create(info := upload(id, metadata=Metadata.of({"id": id})), [event(info)])
        store.create(whole)
        for id in ids:
            info = store.save(store.load(id))
            assert info.metadata.text("id") == id
            assert [one.upload for one in store.events(id)] == [id]
            assert list(store.finals_waiting_for(id)) == [whole.id]
        assert [info.id for info in store.list()] == sorted([*ids, whole.id])
        assert {one.upload for one in store.undelivered(dead=False)} == set(ids)
        store.delete(store.load("*"), [], state=State.TERMINATED, now=1.0)
        assert not any(store.load(id).is_gone for id in ids if id != "*")

    def test_an_id_is_created_once(self, store: InfoStore) -> None:
        info = upload(size=1)
        store.create(info, [event(info)])
        with pytest.raises(UploadExists):
            store.create(replace(info, size=2), [event(info)])
        assert store.load(info.id).size == 1
        assert len(store.events(info.id)) == 1

    def test_one_of_many_creators_wins(self, store: InfoStore) -> None:
        id = new_id()

        def create(size: int) -> int | None:
            info = upload(id, size=size)
            try:
                store.create(info, [event(info)])
            except UploadExists:
                return None
            return size

        sizes = together([lambda n=n: create(n) for n in range(8)])  # type: ignore[misc]
        (winner,) = (size for size in sizes if size is not None)
        assert store.load(id).size == winner
        assert len(store.events(id)) == 1

    def test_a_record_that_does_not_fit_is_not_written(
        self, store: InfoStore, fill: Callable[[], None]
    ) -> None:
        store.create(there := upload())
        fill()
        info = upload(metadata=Metadata("large " + "A" * 2**20), expires_at=1.0)
        with pytest.raises(StorageFull):
            store.create(info, [event(info)])
        with pytest.raises(UploadNotFound):
            store.load(info.id)
        assert list(store.list()) == [there]
        assert list(store.expired(2.0)) == []
        assert list(store.undelivered(dead=False)) == []

    def test_save_replaces_the_record_and_counts_up(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        changed = replace(full(), id=info.id, sequence=info.sequence)
        saved = store.save(changed)
        assert saved == replace(changed, sequence=info.sequence + 1)
        assert store.load(info.id) == saved
        assert store.save(saved).sequence == info.sequence + 2

    def test_a_conflict_changes_nothing(self, store: InfoStore) -> None:
        info = upload(size=None)
        store.create(info, [event(info)])
        saved = store.save(replace(info, size=1), [event(info)])
        events = list(store.events(info.id))
        for sequence in (info.sequence, saved.sequence + 1):
            stale = replace(info, size=2, sequence=sequence, expires_at=1.0)
            with pytest.raises(InfoConflict):
                store.save(stale, [event(stale)])
        assert store.load(info.id) == saved
        assert list(store.events(info.id)) == events
        assert list(store.expired(2.0)) == []

    @pytest.mark.parametrize("size", [None, 0, 1, 2**31, 2**32, 2**53 + 1, MAX_SIZE])
    def test_sizes_are_exact(self, store: InfoStore, size: int | None) -> None:
        info = upload(size=size, offset=size or 0)
        store.create(info)
        loaded = store.load(info.id)
        assert (loaded.size, loaded.offset) == (size, size or 0)

    @pytest.mark.parametrize(
        "raw",
        [
            "",
            "is_confidential",
            "filename d29ybGQ=,is_confidential,empty ",
            "  spaced  d29ybGQ= ,x ",
            "quote'\"%\\{}$?:; YQ==",
            "not-ascii \xc3\xa9\xff\x80",
            "binary " + "AAECAwQ" * 9000 + "AA==",
        ],
        ids=["empty", "key", "pairs", "spaces", "signs", "latin-1", "long"],
    )
    def test_metadata_is_kept_byte_for_byte(self, store: InfoStore, raw: str) -> None:
        info = upload(metadata=Metadata(raw))
        store.create(info)
        assert store.load(info.id).metadata.raw == raw
        store.save(info)
        assert store.load(info.id).metadata.raw == raw

    @pytest.mark.parametrize("state", [State.TERMINATED, State.EXPIRED])
    def test_delete_leaves_a_tombstone(self, store: InfoStore, state: State) -> None:
        info = upload(size=3)
        store.create(info, [event(info)])
        gone = store.delete(info, [event(info)], state=state, now=9.5)
        assert gone.is_gone
        assert gone == replace(info, state=state, deleted_at=9.5, sequence=info.sequence + 1)
        assert store.load(info.id) == gone
        assert len(store.events(info.id)) == 2
        with pytest.raises(UploadExists):
            store.create(info)
        with pytest.raises(InfoConflict):
            store.delete(info, [], state=state, now=10.5)

    def test_a_tombstone_is_forgotten(self, store: InfoStore) -> None:
        info = upload(size=3, expires_at=1.0)
        store.create(info)
        gone = store.delete(info, [], state=State.EXPIRED, now=9.5)
        assert store.forget(gone)
        with pytest.raises(UploadNotFound):
            store.load(info.id)
        assert not store.list()
        assert not store.expired(10.0)
        assert not store.forget(gone)
        store.create(info)
        assert store.load(info.id) == info

    def test_only_a_tombstone_with_this_sequence_is_forgotten(self, store: InfoStore) -> None:
        info = upload()
        assert not store.forget(info)
        store.create(info)
        assert not store.forget(info)
        gone = store.delete(info, [], state=State.TERMINATED, now=9.5)
        for sequence in (info.sequence, gone.sequence + 1):
            assert not store.forget(replace(gone, sequence=sequence))
        assert store.load(info.id) == gone

    def test_a_new_upload_with_the_same_id_is_not_forgotten(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        gone = store.delete(info, [], state=State.TERMINATED, now=9.5)
        assert store.forget(gone)
        store.create(info)
        saved = store.save(info)
        assert saved.sequence == gone.sequence
        assert not store.forget(gone)
        assert store.load(info.id) == saved

    @pytest.mark.parametrize("dead", [False, True])
    def test_a_tombstone_with_events_is_not_forgotten(self, store: InfoStore, dead: bool) -> None:
        info = upload()
        store.create(info)
        told = event(info, sequence=1, transport="http")
        gone = store.delete(info, [told], state=State.TERMINATED, now=9.5)
        if dead:
            store.put_back(told := replace(told, dead=True))
        assert not store.forget(gone)
        assert list(store.undelivered(dead=dead)) == [told]
        store.settle(told)
        assert store.forget(gone)

    def test_a_forgotten_id_can_have_events_again(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        assert store.forget(store.delete(info, [], state=State.TERMINATED, now=9.5))
        store.create(info, [told := event(info, transport="http")])
        assert list(store.claim("a", 10.0, 20.0)) == [told]

    def test_list_is_ordered_and_paged(self, store: InfoStore) -> None:
        ids = ["a", "a-b", "a.b", "a~", "B", "_x", "-x", "0", "z" * 128, *(new_id() for _ in "123")]
        for id in ids:
            store.create(upload(id))
        assert [info.id for info in store.list()] == sorted(ids)
        pages: list[str] = []
        while page := store.list(after=pages[-1] if pages else "", limit=5):
            assert len(page) <= 5
            pages += [info.id for info in page]
        assert pages == sorted(ids)

    def test_list_filters_states(self, store: InfoStore) -> None:
        infos = {state: upload(state=state) for state in State}
        for info in infos.values():
            store.create(info)
        assert {info.state for info in store.list()} == set(State)
        wanted = {State.WAITING, State.EXPIRED}
        assert {info.id for info in store.list(wanted)} == {infos[state].id for state in wanted}
        assert list(store.list([])) == []
        assert list(store.list([State.FINISHED], after=infos[State.FINISHED].id)) == []

    def test_scan_yields_all_records_in_a_state(self, store: InfoStore) -> None:
        ids = sorted(new_id() for _ in range(230))
        for number, id in enumerate(ids):
            store.create(upload(id, state=State.WAITING if number % 3 == 0 else State.FINISHED))
        assert [info.id for info in store.scan(State.WAITING)] == ids[::3]
        assert list(store.scan(State.RECEIVING)) == []

    def test_scan_continues_while_records_change_state(self, store: InfoStore) -> None:
        for _ in range(120):
            store.create(upload())
        for info in store.scan(State.RECEIVING):
            store.delete(info, [], state=State.EXPIRED, now=2.0)
        assert list(store.scan(State.RECEIVING)) == []

    def test_list_sees_changes(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        saved = store.save(replace(info, state=State.FINISHED, finished_at=2.0))
        assert list(store.list([State.RECEIVING])) == []
        assert list(store.list([State.FINISHED])) == [saved]

    def test_expired_returns_unfinished_uploads(self, store: InfoStore) -> None:
        due = upload(expires_at=10.0)
        later = upload(expires_at=10.5)
        never = upload()
        finished = upload(expires_at=9.0, finished_at=8.0, state=State.FINISHED)
        gone = upload(expires_at=9.0, deleted_at=9.5, state=State.EXPIRED)
        waiting = upload(expires_at=9.0, state=State.WAITING, is_final=True)
        for info in (due, later, never, finished, gone, waiting):
            store.create(info)
        assert set(store.expired(10.0)) == {due.id, waiting.id}
        assert len(store.expired(10.0, limit=1)) == 1
        assert list(store.expired(8.9)) == []

    def test_expired_sees_changes(self, store: InfoStore) -> None:
        renewed, finished, deleted = (upload(expires_at=1.0) for _ in range(3))
        for info in (renewed, finished, deleted):
            store.create(info)
        assert len(store.expired(2.0)) == 3
        renewed = store.save(replace(renewed, expires_at=3.0))
        store.save(replace(finished, finished_at=1.5, state=State.FINISHED))
        store.delete(deleted, [], state=State.EXPIRED, now=2.0)
        assert list(store.expired(2.0)) == []
        assert list(store.expired(3.0)) == [renewed.id]

    def test_finals_are_found_by_their_parts(self, store: InfoStore) -> None:
        a = "a" * 32
        b = "b" * 32
        c = "c" * 32
        first = self._final(store, (a, b, a, a))
        second = self._final(store, (b, c))
        assert list(store.finals_waiting_for(a)) == [first.id]
        assert sorted(store.finals_waiting_for(b)) == sorted([first.id, second.id])
        assert list(store.finals_waiting_for(c)) == [second.id]
        assert list(store.finals_waiting_for(new_id())) == []
        assert list(store.finals_waiting_for(first.id)) == []

    def test_finals_wait_until_their_state_changes(self, store: InfoStore) -> None:
        part = new_id()
        finished, deleted, still = (self._final(store, (part, part)) for _ in range(3))
        store.save(replace(finished, state=State.FINISHED, finished_at=2.0))
        store.delete(deleted, [], state=State.TERMINATED, now=2.0)
        saved = store.save(replace(still, owner="me"))
        assert list(store.finals_waiting_for(part)) == [still.id]
        store.save(replace(saved, state=State.RECEIVING))
        assert list(store.finals_waiting_for(part)) == []

    def test_a_finished_final_does_not_wait(self, store: InfoStore) -> None:
        part = new_id()
        final = upload(is_final=True, partial_uploads=(part,), state=State.FINISHED)
        store.create(final)
        assert list(store.finals_waiting_for(part)) == []

    @staticmethod
    def _final(store: InfoStore, parts: tuple[str, ...]) -> FileInfo:
        info = upload(is_final=True, partial_uploads=parts, state=State.WAITING)
        store.create(info)
        return info

    def test_usage_is_the_sum_of_promises(self, store: InfoStore) -> None:
        assert store.usage() == 0
        infos = [upload(size=2**40 + n) for n in range(3)]
        deferred = upload(size=None, offset=700)
        for info in (*infos, deferred, upload(size=0), upload(size=5, state=State.FINISHED)):
            store.create(info)
        assert store.usage() == 3 * 2**40 + 3 + 700 + 5
        deferred = store.save(replace(deferred, reserved=1000))
        assert store.usage() == 3 * 2**40 + 3 + 1000 + 5
        store.save(replace(deferred, size=800, reserved=0))
        assert store.usage() == 3 * 2**40 + 3 + 800 + 5

    def test_tombstones_promise_nothing(self, store: InfoStore) -> None:
        info = upload(size=10)
        stays = upload(size=3)
        store.create(info)
        store.create(stays)
        store.create(upload(size=7, state=State.EXPIRED, deleted_at=2.0))
        gone = store.delete(info, [], state=State.TERMINATED, now=9.5)
        assert store.usage() == 3
        assert store.forget(gone)
        assert store.usage() == 3

    def test_usage_of_many_and_of_large_uploads(self, store: InfoStore) -> None:
        for _ in range(230):
            store.create(upload(size=10))
        assert store.usage() == 2300
        for _ in range(2):
            store.create(upload(size=MAX_SIZE))
        assert store.usage() == pytest.approx(2 * MAX_SIZE)

    def test_many_uploads_are_saved_at_once(self, store: InfoStore) -> None:
        infos = [upload() for _ in range(50)]

        def live(info: FileInfo) -> FileInfo:
            store.create(info, [event(info)])
            for _ in range(3):
                info = store.save(replace(info, offset=info.offset + 1), [event(info)])
            return info

        saved = together([lambda info=info: live(info) for info in infos])  # type: ignore[misc]
        assert sorted(saved, key=lambda info: info.id) == list(store.list())
        assert all(info.offset == 3 and len(store.events(info.id)) == 4 for info in saved)

    def test_writers_of_one_record_exclude_each_other(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)

        def add() -> int:
            conflicts = 0
            while True:
                found = store.load(info.id)
                try:
                    store.save(replace(found, offset=found.offset + 1), [event(found)])
                except InfoConflict:
                    conflicts += 1
                else:
                    return conflicts

        together([add] * 20)
        saved = store.load(info.id)
        assert (saved.offset, saved.sequence) == (20, info.sequence + 20)
        assert [told.sequence for told in store.events(info.id)] == list(range(20))

    def test_other_instances_see_writes(self, store: InfoStore, other: InfoStore) -> None:
        info = upload(expires_at=1.0)
        for writer, reader in ((store, other), (other, store)) * 3:
            try:
                info = writer.save(replace(info, offset=info.offset + 1), [event(info)])
            except UploadNotFound:
                writer.create(info, [event(info)])
            assert reader.load(info.id) == info
            assert list(reader.list()) == [info]
            assert list(reader.expired(1.0)) == [info.id]
            assert list(reader.events(info.id)) == list(writer.events(info.id))
        with pytest.raises(InfoConflict):
            store.save(replace(info, sequence=0))
