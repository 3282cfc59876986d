"""Post-hooks are delivered in order, despite failures, by any worker that is alive."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuswsgi.core.errors import HookFailed, Unavailable
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, State
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse
from tuswsgi.hooks.callable import CallableHook
from tuswsgi.hooks.manager import HookManager
from tuswsgi.hooks.retries import PermanentFailure
from tuswsgi.hooks.settings import HookSettings
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.outbox import delivery, queues
from tuswsgi.outbox.events import event_of
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.outbox.sending import OnAnswer
from tuswsgi.outbox.settings import DeliveryMode, DeliverySettings

#: Seconds after which a test gives up waiting: more than a busy machine ever needs.
PATIENCE = 30.0

CREATED, FINISHED, TERMINATED = (
    HookType.POST_CREATE,
    HookType.POST_FINISH,
    HookType.POST_TERMINATE,
)
PROGRESS = HookType.POST_RECEIVE

QUICK = DeliverySettings(delivery_backoff=0.01, delivery_max_backoff=0.05)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.002)


class Receiver(Hook):
    """A transport that keeps the hooks that it is sent.

    :ivar behave: what it does with each request besides: it may block, raise or answer.
    """

    name = "receiver"

    def __init__(self, name: str = "receiver") -> None:
        self.name = name  # type: ignore[misc]
        self.types = frozenset(HookType)
        self.begun: list[HookRequest] = []
        self.sent: list[HookRequest] = []
        self.behave: Callable[[HookRequest], HookResponse | None] = lambda request: None
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def send(self, request: HookRequest) -> HookResponse | None:
        with self._lock:
            self.begun.append(request)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            answer = self.behave(request)
        finally:
            with self._lock:
                self.at_once -= 1
        self.sent.append(request)
        return answer

    def types_of(self, upload: str) -> list[HookType]:
        return [request.type for request in self.sent if request.info.id == upload]


def wait_for(gate: threading.Event | threading.Barrier) -> Callable[[HookRequest], None]:
    """Return a behaviour: block until `gate` opens."""

    def behave(request: HookRequest) -> None:
        gate.wait(PATIENCE)

    return behave


@pytest.fixture(params=["memory", "sql", "file"])
def infos(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InfoStore]:
    store: InfoStore = MemoryInfoStore()
    if request.param == "sql":
        store = SqlInfoStore(info_db_dsn=f"sqlite:///{tmp_path}/info.sqlite3")
    elif request.param == "file":
        store = FileInfoStore(info_dir=tmp_path)
    store.prepare()
    yield store
    store.close()


@pytest.fixture(autouse=True)
def frequent_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_POLL", (0.02, 0.05))


@pytest.fixture
def rare_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch polling off, so that only woken uploads are delivered."""
    monkeypatch.setattr(delivery, "_POLL", (3600.0, 3600.0))


def outbox_of(
    infos: InfoStore,
    *hooks: Hook,
    settings: DeliverySettings = QUICK,
    on_answer: OnAnswer = lambda request, answer: None,
) -> Outbox:
    manager = HookManager(hooks, HookSettings(), lambda info: None)
    return Outbox(infos, manager, settings, on_answer)


@contextmanager
def delivering(infos: InfoStore, *hooks: Hook, **options: Any) -> Iterator[Outbox]:
    one = outbox_of(infos, *hooks, **options)
    one.start()
    try:
        yield one
    finally:
        one.stop(PATIENCE)


def info_of(upload: str, sequence: int = 0) -> FileInfo:
    now = time.time()
    return FileInfo(
        id=upload,
        size=5,
        offset=0,
        metadata=Metadata(),
        state=State.RECEIVING,
        created_at=now,
        sequence=sequence,
    )


def request_for(upload: str, type: HookType, sequence: int = 0) -> HookRequest:
    return HookRequest(type, info_of(upload), RequestInfo(), sequence=sequence)


def event_for(upload: str, type: HookType, sequence: int, transport: str = "receiver") -> Event:
    return event_of(request_for(upload, type, sequence), transport, time.time())


def write(
    infos: InfoStore, upload: str, *types: HookType, transports: tuple[str, ...] = ("receiver",)
) -> list[Event]:
    """Create an upload with one event after another."""
    events = []
    for number, type in enumerate(types):
        request = request_for(upload, type, number)
        events += [event_of(request, transport, time.time()) for transport in transports]
    infos.create(info_of(upload), events)
    return events


def tell(outbox: Outbox, upload: str, type: HookType, sequence: int = 1) -> None:
    """Have a hook sent that is not recorded."""
    outbox.tell(type, info_of(upload, sequence - 1), RequestInfo())


def pending(infos: InfoStore) -> int:
    return len(infos.undelivered(dead=False))


@pytest.mark.usefixtures("rare_polls")
def test_events_of_a_woken_upload_are_delivered_at_once_and_in_order(infos: InfoStore) -> None:
    receiver = Receiver()
    with delivering(infos, receiver) as outbox:
        events = write(infos, "a", CREATED, FINISHED, TERMINATED)
        outbox.wake("a")
        wait_until(lambda: len(receiver.sent) == 3, "three hooks")
    assert receiver.types_of("a") == [CREATED, FINISHED, TERMINATED]
    assert [request.id for request in receiver.sent] == [event.id for event in events]
    assert [request.sequence for request in receiver.sent] == [0, 1, 2]
    assert receiver.sent[0].info.size == 5
    assert pending(infos) == 0


def test_polling_finds_new_events(infos: InfoStore) -> None:
    receiver = Receiver()
    with delivering(infos, receiver):
        wait_until(lambda: infos.undelivered(dead=False) == [], "a first look")
        write(infos, "a", CREATED)
        wait_until(lambda: receiver.types_of("a") == [CREATED], "the hook")


def test_events_of_an_earlier_process_are_delivered_after_the_start(infos: InfoStore) -> None:
    receiver = Receiver()
    for number in range(50):
        write(infos, f"upload-{number}", CREATED, FINISHED)
    with delivering(infos, receiver):
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert len(receiver.sent) == 100
    for number in range(50):
        assert receiver.types_of(f"upload-{number}") == [CREATED, FINISHED]


def test_each_transport_gets_its_own_events(infos: InfoStore) -> None:
    one, other = Receiver("one"), Receiver("other")
    with delivering(infos, one, other) as outbox:
        write(infos, "a", CREATED, FINISHED, transports=("one", "other"))
        outbox.wake("a")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert one.types_of("a") == other.types_of("a") == [CREATED, FINISHED]


def test_a_failed_event_is_retried_and_holds_up_the_next_one(infos: InfoStore) -> None:
    receiver, failures = Receiver(), 4

    def fail(request: HookRequest) -> None:
        if request.type is CREATED and len(receiver.begun) <= failures:
            raise HookFailed("connection refused")

    receiver.behave = fail
    with delivering(infos, receiver) as outbox:
        write(infos, "a", CREATED, FINISHED)
        write(infos, "b", FINISHED)
        outbox.wake("a")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED, FINISHED]
    tries = [request for request in receiver.begun if request.type is CREATED]
    assert len({request.id for request in tries}) == 1
    assert receiver.types_of("b") == [FINISHED]


def test_a_failure_is_stored_with_its_event(
    infos: InfoStore, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()

    def fail(request: HookRequest) -> None:
        cause = ConnectionError("no route to http://me:secret@host/hook?token=secret (refused)")
        raise HookFailed from cause

    receiver.behave = fail
    settings = DeliverySettings(delivery_backoff=3600, delivery_max_backoff=3600)
    before = time.time()
    with delivering(infos, receiver, settings=settings) as outbox:
        write(infos, "a", FINISHED)
        outbox.wake("a")
        wait_until(lambda: infos.undelivered(dead=False)[0].attempts, "the failure")
    (event,) = infos.undelivered(dead=False)
    assert event.attempts == 1
    shown = "http://********@host/hook?token=********"
    assert event.error == f"ConnectionError: no route to {shown} (refused)"
    assert before + 3600 * 0.7 < event.due_at < time.time() + 3600 * 1.3
    assert "secret" not in caplog.text
    assert "post-finish of a by receiver failed (attempt 1): ConnectionError" in caplog.text


def test_pauses_double_up_to_the_longest() -> None:
    backoff = DeliverySettings().backoff
    for attempts, pause in [(1, 1), (2, 2), (5, 16), (10, 512), (11, 600), (5000, 600)]:
        assert pause * 0.75 <= backoff.after(attempts) <= pause * 1.25
    a_day = sum(backoff.after(attempts) for attempts in range(1, 200))
    assert a_day > 86400


def test_a_dead_letter_does_not_hold_up_the_next_event(
    infos: InfoStore, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver()

    def fail(request: HookRequest) -> None:
        if request.type is CREATED:
            raise ValueError("broken\nfor good")

    receiver.behave = fail
    with delivering(infos, receiver, settings=replace(QUICK, delivery_attempts=3)) as outbox:
        event, _ = write(infos, "a", CREATED, FINISHED)
        outbox.wake("a")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [FINISHED]
    (letter,) = infos.undelivered(dead=True)
    assert (letter.id, letter.attempts) == (event.id, 3)
    assert letter.error == "ValueError: broken for good"
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert "post-create of a by receiver" in line
    assert event.id in line
    assert "broken for good" in line


def test_a_refused_event_is_a_dead_letter_after_few_attempts(
    infos: InfoStore,
) -> None:
    receiver = Receiver()

    def refuse(request: HookRequest) -> None:
        if request.type is CREATED:
            raise PermanentFailure(f"answered 404 ({len(receiver.begun)})")

    receiver.behave = refuse
    with delivering(infos, receiver, settings=replace(QUICK, delivery_refusals=3)) as outbox:
        event, _ = write(infos, "a", CREATED, FINISHED)
        outbox.wake("a")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [FINISHED]
    (letter,) = infos.undelivered(dead=True)
    assert (letter.id, letter.attempts) == (event.id, 3)
    assert letter.error == "Refused: answered 404 (3)"


def test_one_refusal_after_other_failures_makes_no_dead_letter(infos: InfoStore) -> None:
    receiver = Receiver()
    failures = [HookFailed("answered 503")] * 3 + [PermanentFailure("answered 404")]

    def fail(request: HookRequest) -> None:
        if failures:
            raise failures.pop(0)

    receiver.behave = fail
    with delivering(infos, receiver, settings=replace(QUICK, delivery_refusals=2)) as outbox:
        write(infos, "a", CREATED)
        outbox.wake("a")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED]
    assert not infos.undelivered(dead=True)


def test_an_unreadable_event_is_a_dead_letter(infos: InfoStore) -> None:
    receiver = Receiver()
    broken = replace(event_for("a", CREATED, 0), payload={"of": "another version"})
    infos.create(info_of("a"), [broken, event_for("a", FINISHED, 1)])
    with delivering(infos, receiver):
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert [letter.id for letter in infos.undelivered(dead=True)] == [broken.id]
    assert receiver.types_of("a") == [FINISHED]


def test_events_of_a_removed_transport_are_dead_letters(infos: InfoStore) -> None:
    old = replace(event_for("a", CREATED, 0, "gone"), created_at=time.time() - 3600)
    new = event_for("b", CREATED, 0, "perhaps-only-not-yet-here")
    infos.create(info_of("a"), [old])
    infos.create(info_of("b"), [new])
    with delivering(infos, Receiver()):
        wait_until(lambda: infos.undelivered(dead=True), "a dead letter")
    (letter,) = infos.undelivered(dead=True)
    assert letter.id == old.id
    assert letter.error == "There is no transport gone in the configuration"
    assert [event.id for event in infos.undelivered(dead=False)] == [new.id]


def test_a_function_is_called_once_whatever_it_returns(infos: InfoStore) -> None:
    called: list[str] = []

    def count(request: HookRequest) -> Any:
        called.append(request.info.id)
        return len(called)

    functions = CallableHook()
    functions.add(FINISHED, count)
    with delivering(infos, functions):
        infos.create(info_of("a"), [event_for("a", FINISHED, 0, functions.name)])
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert called == ["a"]


def test_a_slow_transport_holds_up_no_other(infos: InfoStore) -> None:
    slow, quick, gate = Receiver("slow"), Receiver("quick"), threading.Event()
    slow.behave = wait_for(gate)
    settings = replace(QUICK, delivery_pool=3)
    with delivering(infos, slow, quick, settings=settings) as outbox:
        for number in range(40):
            write(infos, f"upload-{number}", CREATED, transports=("slow", "quick"))
            outbox.wake(f"upload-{number}")
        wait_until(lambda: len(quick.sent) == 40, "the quick ones")
        assert (len(slow.begun), len(slow.sent)) == (3, 0)
        gate.set()
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert (len(slow.sent), slow.most_at_once) == (40, 3)


def test_a_claim_is_kept_as_long_as_the_delivery_takes(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()

    def behave(request: HookRequest) -> None:
        if request.info.id == "slow":
            gate.wait(PATIENCE)

    receiver.behave = behave
    settings = replace(QUICK, delivery_lease=1.0)
    with delivering(infos, receiver, settings=settings) as outbox:
        write(infos, "slow", CREATED)
        outbox.wake("slow")
        wait_until(lambda: receiver.begun, "the slow one")
        with delivering(infos, receiver, settings=settings):
            later = replace(event_for("later", CREATED, 0), due_at=time.time() + 2.5)
            infos.create(info_of("later"), [later])
            wait_until(lambda: receiver.types_of("later"), "an event after two leases")
        assert [request.info.id for request in receiver.begun] == ["slow", "later"]
        gate.set()
    assert receiver.types_of("slow") == [CREATED]


def test_events_of_a_worker_that_died_are_taken_over(infos: InfoStore) -> None:
    receiver = Receiver()
    write(infos, "a", CREATED, FINISHED)
    now = time.time()
    assert len(infos.claim("a worker that dies", now, now + 1)) == 1
    with delivering(infos, receiver):
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED, FINISHED]
    assert time.time() >= now + 1


@pytest.mark.usefixtures("rare_polls")
def test_a_stopped_process_leaves_its_events_to_others_at_once(infos: InfoStore) -> None:
    stuck, receiver, gate = Receiver(), Receiver(), threading.Event()
    stuck.behave = wait_for(gate)
    one = outbox_of(infos, stuck)
    one.start()
    write(infos, "a", CREATED, FINISHED)
    one.wake("a")
    wait_until(lambda: stuck.begun, "the first hook")
    one.stop(0.2)
    one.stop(0.2)
    with delivering(infos, receiver):
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED, FINISHED]
    gate.set()
    wait_until(lambda: stuck.sent, "the end of the stuck hook")
    assert stuck.types_of("a") == [CREATED]


def test_stop_waits_for_running_deliveries_and_begins_none(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()
    receiver.behave = wait_for(gate)
    one = outbox_of(infos, receiver)
    one.start()
    write(infos, "a", CREATED, FINISHED)
    one.wake("a")
    wait_until(lambda: receiver.begun, "the first hook")
    running = one._delivery.peek()
    assert running is not None
    stopping = threading.Thread(target=one.stop, args=(PATIENCE,))
    stopping.start()
    wait_until(running._stopping.is_set, "the stop")
    gate.set()
    stopping.join(PATIENCE)
    assert receiver.types_of("a") == [CREATED]
    assert [event.type for event in infos.events("a")] == [FINISHED]
    one.start()
    wait_until(lambda: pending(infos) == 0, "the end of all events")
    one.stop(PATIENCE)
    assert receiver.types_of("a") == [CREATED, FINISHED]


class Shaky(MemoryInfoStore):
    """An info store that is away at times."""

    is_away = False

    def _look(self) -> None:
        if self.is_away:
            raise Unavailable("the store is away")

    def claim(self, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return super().claim(*args, **kwargs)

    def settle(self, event: Event) -> None:
        self._look()
        super().settle(event)


def test_delivery_continues_when_the_store_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    infos, receiver = Shaky(), Receiver()

    def leave(request: HookRequest) -> None:
        infos.is_away = True  # between the delivery and its end

    receiver.behave = leave
    with delivering(infos, receiver) as outbox:
        write(infos, "a", CREATED, FINISHED)
        outbox.wake("a")
        wait_until(lambda: "cannot be stored now" in caplog.text, "a first try")
        wait_until(lambda: "cannot be delivered now" in caplog.text, "a complaint")
        receiver.behave = lambda request: None
        infos.is_away = False
        wait_until(lambda: "can be delivered again" in caplog.text, "the end of the trouble")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED, FINISHED]
    assert caplog.text.count("cannot be delivered now") == 1
    assert "Traceback" not in caplog.text


def refuse_threads(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many threads of deliveries fail to start."""
    start, left = threading.Thread.start, [count]

    def refuse(self: threading.Thread) -> None:
        if self.name == "tuswsgi-hook" and left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("count", [1, 5])
def test_events_are_delivered_soon_if_no_thread_could_be_started(
    infos: InfoStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # With this lease the test would time out if a claim had to expire.
    receiver, settings = Receiver(), replace(QUICK, delivery_lease=3600.0)
    refuse_threads(monkeypatch, count)
    for upload in "abc":
        write(infos, upload, CREATED, FINISHED)
    with delivering(infos, receiver, settings=settings):
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert [receiver.types_of(upload) for upload in "abc"] == [[CREATED, FINISHED]] * 3


def test_claims_expire_if_neither_threads_nor_the_store_are_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Away(MemoryInfoStore):
        def put_back(self, event: Event) -> None:
            raise Unavailable

    infos, receiver = Away(), Receiver()
    refuse_threads(monkeypatch, 1)
    with delivering(infos, receiver, settings=replace(QUICK, delivery_lease=1.0)):
        write(infos, "a", FINISHED)
        wait_until(lambda: pending(infos) == 0, "the end of its lease")
    assert receiver.types_of("a") == [FINISHED]


def test_an_error_that_cannot_be_printed_does_not_hold_up_its_event(infos: InfoStore) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fail_once(request: HookRequest) -> None:
        if len(receiver.begun) == 1:
            raise Broken

    receiver = Receiver()
    receiver.behave = fail_once
    with delivering(infos, receiver, settings=replace(QUICK, delivery_lease=3600.0)):
        write(infos, "a", CREATED, FINISHED)
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [CREATED, FINISHED]


def test_progress_is_not_retried(infos: InfoStore) -> None:
    receiver = Receiver()

    def fail(request: HookRequest) -> None:
        if len(receiver.begun) == 1:
            raise HookFailed("connection refused")

    receiver.behave = fail
    infos.create(info_of("a"))
    with delivering(infos, receiver) as outbox:
        tell(outbox, "a", PROGRESS, 1)
        wait_until(lambda: len(receiver.begun) == 1, "the first")
        tell(outbox, "a", PROGRESS, 2)
        wait_until(lambda: receiver.sent, "the second")
    assert [request.sequence for request in receiver.begun] == [1, 2]
    assert [request.sequence for request in receiver.sent] == [2]


def test_progress_is_dropped_while_an_event_is_pending(infos: InfoStore) -> None:
    receiver = Receiver()
    later = replace(event_for("a", CREATED, 0), due_at=time.time() + 3600)
    infos.create(info_of("a"), [later])
    infos.create(info_of("b"))
    settings = replace(QUICK, delivery_pool=1)
    with delivering(infos, receiver, settings=settings) as outbox:
        tell(outbox, "a", PROGRESS)
        tell(outbox, "b", PROGRESS)
        wait_until(lambda: receiver.types_of("b"), "progress of another upload")
    assert receiver.types_of("a") == []


def test_only_the_newest_progress_waits(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()
    receiver.behave = wait_for(gate)
    infos.create(info_of("a"))
    with delivering(infos, receiver) as outbox:
        tell(outbox, "a", PROGRESS, 1)
        wait_until(lambda: receiver.begun, "the first")
        for sequence in range(2, 10):
            tell(outbox, "a", PROGRESS, sequence)
        gate.set()
        wait_until(lambda: len(receiver.sent) == 2, "the newest")
    assert [request.sequence for request in receiver.sent] == [1, 9]
    assert receiver.most_at_once == 1


def test_progress_is_never_sent_with_or_after_a_later_event(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()

    def behave(request: HookRequest) -> None:
        if request.type is PROGRESS:
            gate.wait(PATIENCE)

    receiver.behave = behave
    infos.create(info_of("a"))
    with delivering(infos, receiver) as outbox:
        tell(outbox, "a", PROGRESS, 1)
        wait_until(lambda: receiver.begun, "progress")
        tell(outbox, "a", PROGRESS, 2)
        infos.save(info_of("a"), [event_for("a", FINISHED, 3)])
        outbox.wake("a")
        now = time.time()
        # It is claimed by now, and waits for the progress that is being sent.
        wait_until(lambda: not infos.claim("another", now, now), "the claim")
        assert len(receiver.begun) == 1
        gate.set()
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    assert receiver.types_of("a") == [PROGRESS, FINISHED]
    assert receiver.most_at_once == 1


def test_progress_uses_no_slots_of_events(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()

    def behave(request: HookRequest) -> None:
        if request.type is PROGRESS:
            gate.wait(PATIENCE)

    receiver.behave = behave
    with delivering(infos, receiver, settings=replace(QUICK, delivery_pool=2)) as outbox:
        for number in range(5):
            infos.create(info_of(f"slow-{number}"))
            tell(outbox, f"slow-{number}", PROGRESS)
        write(infos, "a", FINISHED)
        outbox.wake("a")
        wait_until(lambda: receiver.types_of("a"), "the event")
        gate.set()
        wait_until(lambda: len(receiver.sent) == 6, "all progress")


def test_an_answer_to_progress_can_stop_its_upload(
    infos: InfoStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receiver = Receiver()
    stop = HookResponse(stop=True, status=413, body="enough")
    receiver.behave = lambda request: stop
    heard: list[tuple[HookRequest, HookResponse]] = []
    infos.create(info_of("a"))
    with delivering(infos, receiver, on_answer=lambda *both: heard.append(both)) as outbox:
        tell(outbox, "a", PROGRESS)
        wait_until(lambda: heard, "the answer")
        write(infos, "b", FINISHED)
        outbox.wake("b")
        wait_until(lambda: pending(infos) == 0, "the end of all events")
    ((request, answer),) = heard
    assert (request.info.id, answer) == ("a", stop)
    assert "post-finish of b by receiver: the answer comes too late" in caplog.text


def test_fire_and_forget_sends_hooks_once_and_in_order(infos: InfoStore) -> None:
    receiver, gate = Receiver(), threading.Event()

    def behave(request: HookRequest) -> None:
        gate.wait(PATIENCE)
        if request.type is FINISHED:
            raise HookFailed("connection refused")

    receiver.behave = behave
    settings = replace(QUICK, delivery=DeliveryMode.FIRE_AND_FORGET)
    with delivering(infos, receiver, settings=settings) as outbox:
        assert not outbox.keeps_events
        for type in (CREATED, FINISHED, TERMINATED):
            tell(outbox, "a", type)
        gate.set()
        wait_until(lambda: len(receiver.begun) == 3, "all hooks")
    assert [request.type for request in receiver.begun] == [CREATED, FINISHED, TERMINATED]
    assert receiver.types_of("a") == [CREATED, TERMINATED]


def test_hooks_beyond_the_queue_size_are_dropped(
    infos: InfoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "QUEUE_SIZE", 5)
    receiver, gate = Receiver(), threading.Event()
    receiver.behave = wait_for(gate)
    settings = replace(QUICK, delivery=DeliveryMode.FIRE_AND_FORGET, delivery_pool=2)
    with delivering(infos, receiver, settings=settings) as outbox:
        for number in range(20):
            tell(outbox, f"upload-{number}", FINISHED)
            wait_until(lambda n=number: len(receiver.begun) == min(n + 1, 2), "its turn")
        gate.set()
        wait_until(lambda: len(receiver.sent) == 7, "what there was room for")
    assert len(receiver.begun) == 7
    assert receiver.most_at_once == 2


def test_nothing_is_delivered_without_a_start(infos: InfoStore) -> None:
    receiver = Receiver()
    one = outbox_of(infos, receiver)
    write(infos, "a", CREATED)
    one.wake("a")
    tell(one, "a", PROGRESS)
    one.stop(0)
    assert threading.active_count() == len(threading.enumerate())
    assert receiver.begun == []


UNDER_GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys, threading, time
sys.path[:0] = sys.argv[1:]
from test_delivery import *

barrier = threading.Barrier(16)
receiver = Receiver()
receiver.behave = wait_for(barrier)
infos = MemoryInfoStore()
with delivering(infos, receiver) as outbox:
    for number in range(32):
        write(infos, f"upload-{number}", CREATED)
        outbox.wake(f"upload-{number}")
    wait_until(lambda: pending(infos) == 0, "the end of all events")
assert len(receiver.sent) == 32
print("fine")
"""


FORKED = """
import os, sys
sys.path[:0] = sys.argv[2:]
from test_delivery import *

infos = SqlInfoStore(info_db_dsn=f"sqlite:///{sys.argv[1]}/info.sqlite3")
infos.prepare()
receiver = Receiver()
receiver.behave = lambda request: print("delivered by", os.getpid(), flush=True)
one = outbox_of(infos, receiver)
one.start()
write(infos, "a", CREATED)
one.wake("a")
wait_until(lambda: receiver.sent, "the hook")
# Not while a thread works: it may be in SQLite, whose locks the child would inherit.
one.stop(PATIENCE)
infos.close()
child = os.fork()
if child == 0:
    write(infos, "b", CREATED)
    one.wake("b")
    assert len(receiver.begun) == 1
    one.start()
    wait_until(lambda: receiver.types_of("b"), "the hook of the child")
    one.stop(PATIENCE)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


def run_script(script: str, *args: Path) -> str:
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, *args, here, here.parent.parent]
    result = subprocess.run(
        [str(one) for one in command], capture_output=True, text=True, timeout=PATIENCE * 2
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_deliveries_run_side_by_side_under_gevent() -> None:
    assert run_script(UNDER_GEVENT) == "fine\n"


def test_a_forked_child_delivers_after_its_own_start(tmp_path: Path) -> None:
    *delivered, end = run_script(FORKED, tmp_path).splitlines()
    assert end == "fine"
    assert 1 <= len(delivered) <= 2
