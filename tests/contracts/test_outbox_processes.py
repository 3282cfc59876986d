"""The guarantees of the outbox while processes claim, deliver and are killed at random."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from multiprocessing.connection import wait

from test_processes import Child

from tuswsgi.core.events import HookType
from tuswsgi.testing.lockers import SOON
from tuswsgi.testing.records import event, upload

#: Seconds until the claims of a killed worker expire.
LEASE = 1.0

UPLOADS, EVENTS = 250, 3


def deliver_for_ever(connection, make, directory, name):
    """Claim and deliver, and report each delivery and each broken guarantee."""
    store, deliveries = make(directory), directory / "deliveries"
    connection.send("ready")
    connection.recv()
    while True:
        now = time.time()
        events = store.claim(name, now, now + LEASE, limit=5)
        if not events:
            time.sleep(0.02)
            continue
        for claimed in events:
            held = deliveries / f"{claimed.id}.held"
            if held.exists() and float(held.read_text() or 0) > now:
                connection.send(("claimed by another worker", claimed.id))
            held.write_text(repr(now + LEASE))
            before = deliveries / f"{claimed.upload}-{claimed.sequence - 1}.done"
            if claimed.sequence and not before.exists():
                connection.send(("too early", claimed.id))
            time.sleep(random.uniform(0, 0.01))
            if random.random() < 0.2:
                held.write_text("")
                store.put_back(replace(claimed, attempts=claimed.attempts + 1))
                continue
            (deliveries / f"{claimed.upload}-{claimed.sequence}.done").touch()
            connection.send(("delivered", claimed.id))
            store.settle(claimed)


def listen(workers, heard, count):
    """Receive `count` reports, or fewer if no more come for some time."""
    for _ in range(count):
        ready = wait([child._connection for child in workers], timeout=0.2)
        heard += [connection.recv() for connection in ready]


def test_killed_workers_lose_no_event_and_break_no_claim(tmp_path, make):
    store = make(tmp_path)
    store.prepare()
    written = {}
    for _ in range(UPLOADS):
        info = upload()
        store.create(info, [first := event(info, HookType.POST_CREATE, transport="http")])
        events = [first]
        for n in range(1, EVENTS):
            events.append(event(info, sequence=n, transport="http"))
            info = store.save(info, [events[-1]])
        written.update({told.id: told for told in events})
    deliveries = tmp_path / "deliveries"

    def start():
        child = Child(deliver_for_ever, make, tmp_path, f"worker {random.random()}")
        assert child.hear() == "ready"
        return child

    deliveries.mkdir()
    workers, heard = [start() for _ in range(4)], []
    try:
        for child in workers:
            child.tell("go")
        for _ in range(6):
            listen(workers, heard, random.randint(1, 12))
            victim = workers.pop(random.randrange(len(workers)))
            victim.kill()
            heard += drained(victim)
            victim.end()
            workers.append(start())
            workers[-1].tell("go")
        deadline = time.monotonic() + SOON * 6
        while store.undelivered(dead=False):
            assert time.monotonic() < deadline, "some events are never delivered"
            listen(workers, heard, 1)
    finally:
        for child in workers:
            child.kill()
            heard += drained(child)
            child.end()
    assert {kind for kind, _ in heard} == {"delivered"}
    assert len(list(deliveries.glob("*.done"))) == len(written)
    assert all(store.events(told.upload) == [] for told in written.values())
    assert store.undelivered(dead=True) == []
    store.close()


def drained(child):
    """Return the unread reports of a dead child."""
    heard = []
    try:
        while child._connection.poll():
            heard.append(child._connection.recv())
    except (EOFError, OSError):
        pass  # its last word was cut off
    return heard
