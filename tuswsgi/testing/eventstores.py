"""The contract of ``EventStore`` as tests, a part of ``InfoStoreContract``.

The times are made up: a store has no clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from tuswsgi.core.errors import InfoConflict, UploadExists
from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import MAX_SIZE, FileInfo, State, new_id
from tuswsgi.core.process import let_others_run
from tuswsgi.infostores.base import InfoStore
from tuswsgi.testing.records import event, together, upload

NOW = 100.0
UNTIL = 130.0
LATER = 1000.0


def created(
    store: InfoStore, *transports: str, count: int = 1, due_at: float = 0.0
) -> tuple[FileInfo, list[Event]]:
    """Create an upload with `count` events for each of the transports."""
    info = upload()
    events = [
        event(info, sequence=n, transport=transport, due_at=due_at)
        for n in range(count)
        for transport in transports or ("http",)
    ]
    store.create(info, events)
    return info, events


def claim(store: InfoStore, now: float = NOW, until: float = UNTIL) -> Sequence[Event]:
    """Claim all events that can be claimed, as a worker that then disappears."""
    return store.claim("worker", now, until)


def keys(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Return the ids and transports of events, sorted."""
    return sorted((event.id, event.transport) for event in events)


class EventStoreContract:
    """Tests of the events, with the fixtures of ``InfoStoreContract``."""

    def test_events_come_back_as_they_were(self, store: InfoStore) -> None:
        info = upload()
        payload = {"text": "кошка \N{CAT FACE}", "n": MAX_SIZE, "none": None, "deep": [{"a": []}]}
        first = event(info, HookType.POST_CREATE, payload=payload, created_at=1.25)
        store.create(info, [first])
        assert list(store.events(info.id)) == [first]

    def test_events_are_kept_in_order(self, store: InfoStore) -> None:
        info = upload()
        told = [event(info), event(info, HookType.POST_CREATE), event(info)]
        store.create(info, told)
        for _ in range(3):
            more = [event(info, sequence=info.sequence + 1) for _ in "12"]
            info = store.save(info, more)
            told += more
        store.save(info)
        assert list(store.events(info.id)) == told

    def test_an_upload_without_events_has_none(self, store: InfoStore) -> None:
        info = upload()
        neighbour = upload()
        store.create(info)
        store.create(neighbour, [event(neighbour)])
        assert list(store.events(info.id)) == list(store.events(new_id())) == []

    def test_dead_letters_are_listed_separately(self, store: InfoStore) -> None:
        info = upload()
        first, second = (event(info, sequence=n, transport="http") for n in range(2))
        store.create(info, [first, second])
        store.put_back(first := replace(first, dead=True))
        assert list(store.events(info.id)) == [second]
        assert list(store.events(info.id, dead=True)) == [first]

    def test_an_empty_outbox_has_nothing_to_claim(self, store: InfoStore) -> None:
        store.create(upload())
        assert list(claim(store)) == []
        assert list(store.undelivered(dead=False)) == list(store.undelivered(dead=True)) == []

    def test_claimed_events_are_returned_as_they_were_written(self, store: InfoStore) -> None:
        info = upload()
        written = event(
            info,
            HookType.POST_FINISH,
            transport="http",
            payload={"text": "кошка \N{CAT FACE}", "none": None, "deep": [{"a": []}]},
            created_at=1.25,
            due_at=0.5,
            attempts=3,
            error="não",
        )
        store.create(info, [written])
        assert list(claim(store)) == [written]

    def test_a_claimed_event_cannot_be_claimed_again(self, store: InfoStore) -> None:
        info, events = created(store)
        assert list(store.claim("a", NOW, UNTIL)) == events
        for worker in ("a", "b"):
            assert list(store.claim(worker, NOW, UNTIL)) == []
            assert list(store.claim(worker, UNTIL - 0.001, LATER, upload=info.id)) == []
        assert list(store.events(info.id)) == list(store.undelivered(dead=False)) == events

    def test_an_event_is_claimed_when_it_is_due(self, store: InfoStore) -> None:
        _, events = created(store, due_at=NOW)
        assert list(claim(store, NOW - 0.001)) == []
        assert list(claim(store, NOW)) == events

    def test_an_event_waits_for_those_before_it(self, store: InfoStore) -> None:
        _, events = created(store, count=3)
        for first in events:
            assert list(claim(store)) == [first]
            assert list(claim(store)) == []
            store.settle(first)
        assert list(claim(store)) == []

    def test_the_event_with_the_lowest_sequence_is_first(self, store: InfoStore) -> None:
        info = upload()
        second = event(info, sequence=2, transport="http")
        store.create(info, [second, first := event(info, sequence=1, transport="http")])
        assert list(store.events(info.id)) == [first, second]
        assert list(claim(store)) == [first]
        store.save(info, [before := event(info, sequence=0, transport="http")])
        assert list(claim(store)) == [before]
        store.settle(before)
        store.settle(first)
        assert list(claim(store)) == [second]

    def test_an_event_that_is_not_due_holds_up_its_upload_only(self, store: InfoStore) -> None:
        info, _ = created(store, due_at=LATER)
        store.save(info, [event(info, transport="http")])
        _, others = created(store)
        assert list(claim(store)) == others

    def test_transports_do_not_wait_for_each_other(self, store: InfoStore) -> None:
        _, events = created(store, "file", "http", "amqp", count=2)
        assert keys(claim(store)) == keys(events[:3])
        store.settle(events[1])
        assert list(claim(store)) == [events[4]]

    def test_transports_share_the_id_of_a_hook(self, store: InfoStore) -> None:
        info = upload()
        told = event(info, transport="file")
        copies = [told, replace(told, transport="http"), replace(told, transport="amqp")]
        store.create(info, copies)
        assert keys(claim(store)) == keys(copies)
        store.settle(copies[0])
        store.put_back(replace(copies[1], attempts=1))
        assert keys(store.events(info.id)) == keys(copies[1:])
        assert keys(claim(store)) == keys(copies[1:2])

    def test_claims_of_one_upload(self, store: InfoStore) -> None:
        info, events = created(store, "file", "http")
        created(store, "file", "http")
        assert keys(store.claim("a", NOW, UNTIL, upload=info.id)) == keys(events)
        assert list(store.claim("a", NOW, UNTIL, upload=info.id)) == []
        assert list(store.claim("a", NOW, UNTIL, upload="unknown")) == []
        assert list(store.claim("a", NOW, UNTIL, upload="../..")) == []

    def test_claims_of_one_transport(self, store: InfoStore) -> None:
        info, (first, second) = created(store, "file", "http")
        _, (third, _) = created(store, "file", "http")
        found = store.claim("a", NOW, UNTIL, transport="http", upload=info.id)
        assert list(found) == [second]
        assert keys(store.claim("a", NOW, UNTIL, transport="file")) == keys([first, third])
        assert list(store.claim("a", NOW, UNTIL, transport="amqp")) == []

    def test_no_more_events_than_the_limit_are_claimed(self, store: InfoStore) -> None:
        events = [one for _ in range(5) for one in created(store, "file", "http")[1]]
        found: list[Event] = []
        while more := store.claim("a", NOW, UNTIL, limit=3):
            assert len(more) <= 3
            found += more
        assert keys(found) == keys(events)

    def test_a_claim_expires(self, store: InfoStore) -> None:
        _, events = created(store)
        assert list(store.claim("a", NOW, UNTIL)) == events
        assert list(store.claim("b", UNTIL, LATER)) == events
        store.renew("a", LATER * 2)
        assert list(store.claim("c", LATER, LATER * 2)) == events

    def test_renewed_claims_hold_longer(self, store: InfoStore) -> None:
        (mine, _), (theirs, _) = (created(store, count=2)[1] for _ in "12")
        assert list(store.claim("a", NOW, UNTIL, upload=mine.upload)) == [mine]
        assert list(store.claim("b", NOW, UNTIL, upload=theirs.upload)) == [theirs]
        store.renew("a", LATER)
        assert list(claim(store, UNTIL, LATER)) == [theirs]
        assert list(claim(store, LATER - 0.001, LATER)) == []
        assert keys(claim(store, LATER, LATER * 2)) == keys([mine, theirs])

    def test_an_expired_claim_can_be_renewed(self, store: InfoStore) -> None:
        _, events = created(store)
        store.claim("a", NOW, UNTIL)
        store.renew("a", LATER)
        assert list(claim(store, UNTIL)) == []
        assert list(claim(store, LATER, LATER * 2)) == events

    def test_claims_can_be_released(self, store: InfoStore) -> None:
        events = created(store, "file", "http")[1] + created(store)[1]
        assert keys(store.claim("a", NOW, UNTIL)) == keys(events)
        store.renew("b", 0.0)
        assert list(claim(store)) == []
        store.renew("a", 0.0)
        assert keys(claim(store)) == keys(events)

    def test_a_settled_event_is_removed(self, store: InfoStore) -> None:
        info, (first, second) = created(store, count=2)
        for _ in range(3):
            store.settle(first)
            assert list(store.events(info.id)) == list(store.undelivered(dead=False)) == [second]
        store.settle(second)
        store.settle(event(info, transport="http"))
        store.settle(event(upload(), transport="http"))
        assert list(store.events(info.id)) == list(store.undelivered(dead=False)) == []

    def test_put_back_stores_the_outcome(self, store: InfoStore) -> None:
        info, (first, second) = created(store, count=2)
        (claimed,) = claim(store)
        tried = replace(claimed, due_at=NOW + 1, attempts=1, error="упал\n")
        store.put_back(tried)
        assert list(store.events(info.id)) == [tried, second]
        assert list(claim(store)) == []
        assert list(claim(store, NOW + 1)) == [tried]
        store.settle(first)
        assert list(claim(store)) == [second]

    def test_an_unknown_event_is_not_put_back(self, store: InfoStore) -> None:
        info, (first, _) = created(store, count=2)
        store.settle(first)
        events = list(store.events(info.id))
        store.put_back(replace(first, attempts=1))
        store.put_back(event(info, transport="amqp"))
        store.put_back(event(upload(), transport="http"))
        assert list(store.events(info.id)) == list(store.undelivered(dead=False)) == events

    def test_a_dead_letter_holds_up_no_other_event(self, store: InfoStore) -> None:
        info, (first, second) = created(store, count=2)
        (claimed,) = claim(store)
        dead = replace(claimed, dead=True, attempts=9, error="no more")
        store.put_back(dead)
        assert list(store.events(info.id)) == list(store.undelivered(dead=False)) == [second]
        assert list(store.undelivered(dead=True)) == [dead]
        assert list(claim(store)) == [second]
        store.settle(second)
        assert list(claim(store, LATER, LATER * 2)) == []
        store.settle(first)
        assert list(store.undelivered(dead=True)) == []

    def test_dead_letters_can_be_created_with_a_record(self, store: InfoStore) -> None:
        info = upload()
        dead = event(info, transport="http", dead=True, attempts=9, error="no more")
        store.create(info, [dead, told := event(info, transport="http", attempts=2)])
        assert list(store.undelivered(dead=True)) == [dead]
        assert list(claim(store)) == [told]
        store.put_back(again := replace(dead, dead=False))
        assert list(store.events(info.id)) == [again, told]

    def test_a_dead_letter_can_be_retried(self, store: InfoStore) -> None:
        info, (first, second) = created(store, count=2)
        dead = replace(first, dead=True)
        store.put_back(dead)
        _, (only,) = created(store)
        store.put_back(replace(only, dead=True))
        assert list(claim(store)) == [second]
        for told in (first, only):
            store.put_back(told)
        assert list(store.undelivered(dead=True)) == []
        assert list(store.events(info.id)) == [first, second]
        assert keys(claim(store)) == keys([first, only])
        # The claim on the second one holds, though another one is before it by now.
        store.settle(first)
        assert list(claim(store)) == []
        assert keys(claim(store, UNTIL, LATER)) == keys([second, only])

    def test_changing_events_does_not_change_the_record(self, store: InfoStore) -> None:
        info, events = created(store, count=3)
        for told in events:
            assert list(claim(store)) == [told]
            store.renew("worker", LATER)
            store.put_back(replace(told, attempts=1))
            assert list(claim(store)) == [replace(told, attempts=1)]
            store.settle(told)
        assert store.load(info.id) == info
        assert store.save(info).sequence == info.sequence + 1

    def test_a_failed_write_adds_no_event(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        told = event(info, transport="http")
        with pytest.raises(UploadExists):
            store.create(info, [told])
        with pytest.raises(InfoConflict):
            store.save(replace(info, sequence=7), [told])
        assert list(claim(store)) == list(store.undelivered(dead=False)) == []
        store.save(info, [told])
        assert list(claim(store)) == [told]

    def test_claims_survive_writes_of_the_record(self, store: InfoStore) -> None:
        info, (first,) = created(store)
        assert list(claim(store)) == [first]
        info = store.save(info, [second := event(info, sequence=1, transport="http")])
        assert list(claim(store)) == []
        store.delete(info, [], state=State.TERMINATED, now=3.0)
        assert list(claim(store)) == []
        assert list(claim(store, UNTIL, LATER)) == [first]
        store.settle(first)
        assert list(claim(store)) == [second]

    def test_the_outbox_is_sorted_by_age(self, store: InfoStore) -> None:
        infos = [upload() for _ in range(5)]
        told = [event(info, transport="http", created_at=float(n)) for n, info in enumerate(infos)]
        for info, one in zip(infos, told, strict=True):
            store.create(info, [one])
        assert list(store.undelivered(dead=False)) == told
        assert list(store.undelivered(dead=False, limit=2)) == told[:2]
        dead = [replace(one, dead=True) for one in told[1:4]]
        for one in dead:
            store.put_back(one)
        assert list(store.undelivered(dead=True)) == dead
        assert list(store.undelivered(dead=True, limit=2)) == dead[:2]
        assert list(store.undelivered(dead=False)) == [told[0], told[4]]

    def test_concurrent_workers_claim_different_events(
        self, store: InfoStore, other: InfoStore
    ) -> None:
        events = [told for _ in range(20) for told in created(store, "file", "http")[1]]

        def work(one: InfoStore, name: str) -> list[Event]:
            found: list[Event] = []
            while more := one.claim(name, NOW, UNTIL, limit=3):
                found += more
            return found

        calls = [partial(work, (store, other)[n % 2], f"w{n}") for n in range(6)]
        found = [told for part in together(calls) for told in part]
        assert set(keys(found)) == set(keys(events))
        assert len(found) == len(events)

    def test_other_instances_see_claims(self, store: InfoStore, other: InfoStore) -> None:
        info, (first, second) = created(store, count=2)
        assert list(other.claim("a", NOW, UNTIL)) == [first]
        assert list(store.claim("b", NOW, UNTIL)) == []
        other.renew("a", LATER)
        assert list(store.claim("b", UNTIL, LATER)) == []
        other.put_back(tried := replace(first, attempts=1, due_at=NOW + 1))
        assert list(store.events(info.id)) == list(other.events(info.id)) == [tried, second]
        assert list(store.claim("b", NOW + 1, UNTIL)) == [tried]
        store.put_back(replace(tried, dead=True))
        assert len(other.undelivered(dead=True)) == 1
        assert list(other.claim("a", NOW, UNTIL)) == [second]
        store.settle(second)
        assert list(other.undelivered(dead=False)) == []

    def test_events_are_written_while_others_are_settled(
        self, store: InfoStore, other: InfoStore
    ) -> None:
        info = upload()
        store.create(info)
        told: list[Event] = []

        def write() -> None:
            written = info
            for n in range(30):
                written = store.save(
                    written, [event(info, sequence=n + 1, transport="http", payload={"n": n})]
                )

        def deliver() -> None:
            give_up = time.monotonic() + 60
            while len(told) < 30 and time.monotonic() < give_up:
                for one in other.claim("a", NOW, UNTIL):
                    told.append(one)
                    other.settle(one)
                let_others_run()

        together([write, deliver])
        assert [one.payload["n"] for one in told] == list(range(30))
        assert store.load(info.id).sequence == 30
        assert list(store.undelivered(dead=False)) == []
