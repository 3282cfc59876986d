"""Brings post-hooks to their transports, for as long as it takes.

Events wait in the info store; here is decided which worker delivers them and when, what a
failure means, and when to give up. It owns no transport and writes no event: that comes
with the change of state that the event tells of.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from marshmallow import ValidationError

from tuswsgi.core.backoff import Backoff, jitter
from tuswsgi.core.display import printable, without_secrets
from tuswsgi.core.errors import TusError
from tuswsgi.core.events import Event, HookType
from tuswsgi.core.options import Duration, option
from tuswsgi.core.process import PerProcess
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse
from tuswsgi.hooks.retries import LastingFailure
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.record import CorruptRecord
from tuswsgi.outbox.claims import Claims
from tuswsgi.outbox.events import request_of
from tuswsgi.outbox.queues import Job, Once, Queues

log = logging.getLogger(__name__)

#: Between attempts to read or write the events, while their store fails.
_BACKOFF = Backoff(first=0.1, longest=5.0)

#: Between these (seconds) is the pause from one look for events that are due to the next.
_POLL = (1.0, 2.0)

#: Seconds between two looks for events of transports that are not configured.
_STRANGERS_PAUSE = 30.0

#: Seconds after which such an event is given up. Until then it may be one of a worker that
#: has been configured anew before this one.
_STRANGERS_AGE = 60.0

#: How many uploads may wait to be looked at; the others are found by the next poll.
_MOST_WOKEN = 10_000

#: Characters of an error that are kept with its event.
_ERROR_LENGTH = 500

#: How an event's error begins whose receiver will not have it.
_REFUSED = "Refused: "


class DeliveryMode(str, Enum):
    """What is promised of post-hooks."""

    AT_LEAST_ONCE = "at-least-once"
    FIRE_AND_FORGET = "fire-and-forget"


def _at_least_one(value: float) -> None:
    if value < 1:
        raise ValidationError("Not 1 or more.")


@dataclass(frozen=True)
class DeliverySettings:
    """How post-hooks are delivered."""

    section: ClassVar[str] = "hooks"

    delivery: DeliveryMode = option(
        DeliveryMode.AT_LEAST_ONCE,
        "`at-least-once` writes post-hooks down with the change that they tell of and repeats "
        "them until they arrive, whatever dies in between; `fire-and-forget` sends them once.",
    )
    delivery_attempts: int = option(
        200,
        "How often a post-hook is tried until it is put to the dead letters. With the pauses "
        "between them, 200 take more than a day.",
        validate=_at_least_one,
    )
    delivery_refusals: int = option(
        8,
        "How often a post-hook is tried that its receiver refuses for good (HTTP: a 4xx other than "
        "408, 425 and 429; gRPC: a status such as `INVALID_ARGUMENT`), until it is put to the dead "
        "letters and the next one of its upload goes. With the pauses between them, 8 take two "
        "minutes.",
        validate=_at_least_one,
    )
    delivery_backoff: float = option(
        1.0,
        "The pause after the first failure of a post-hook; each further one doubles it.",
        kind=Duration,
    )
    delivery_max_backoff: float = option(
        600.0, "The longest pause between two attempts.", kind=Duration
    )
    delivery_pool: int = option(
        16,
        "How many post-hooks a worker delivers at once by each transport.",
        validate=_at_least_one,
    )
    delivery_lease: float = option(
        30.0,
        "How long the events of a worker that died wait until another one takes them over.",
        kind=Duration,
        validate=_at_least_one,
    )

    def pause(self, attempts: int) -> float:
        """Return how long to wait after so many failures, in seconds."""
        backoff = Backoff(self.delivery_backoff, self.delivery_max_backoff, jitter=0.25)
        return backoff.after(attempts)


class Delivery:
    """The ``Messenger`` of a server: one dispatcher in each process that was started.

    :param infos: where events are kept.
    :param hooks: the transports; may be added to later.
    :param on_answer: called with a post-receive hook that answered to stop its upload.
    """

    def __init__(
        self,
        infos: InfoStore,
        hooks: Sequence[Hook],
        settings: DeliverySettings,
        on_answer: Callable[[HookRequest, HookResponse], None] | None = None,
    ) -> None:
        self.keeps_events = settings.delivery is DeliveryMode.AT_LEAST_ONCE
        self._dispatcher = PerProcess(lambda: _Dispatcher(infos, hooks, settings, on_answer))

    def start(self) -> None:
        """Begin to deliver in this process. The info store must be ready."""
        self._dispatcher.get()

    def stop(self, timeout: float) -> None:
        """Begin nothing any more, and wait for what is being delivered.

        What is not delivered by then is left to other workers at once. May be called
        again, and ``start`` afterwards.

        :param timeout: in seconds.
        """
        dispatcher = self._dispatcher.pop()
        if dispatcher is not None:
            dispatcher.stop(timeout)

    def wake(self, upload: str) -> None:
        """Deliver the events of `upload` that are written by now; without ``start``,
        whoever polls next does.
        """
        dispatcher = self._dispatcher.peek()
        if dispatcher is not None:
            dispatcher.wake(upload)

    def send(self, hook: Hook, request: HookRequest) -> None:
        """Send a hook once, soon, if there is room for it. It does not wait.

        Progress is sent in order with the events of its upload, or not at all.
        """
        dispatcher = self._dispatcher.peek()
        if dispatcher is None or not dispatcher.queues.add_once(Once(hook, request)):
            log.debug("%s is dropped", _name_of(hook, request))


class _Dispatcher:
    """Claims events and delivers them, in one process.

    Its own thread claims and keeps claims; it waits for the info store but never for a
    transport. Each delivery has a thread of its own in `queues`.
    """

    def __init__(
        self,
        infos: InfoStore,
        hooks: Sequence[Hook],
        settings: DeliverySettings,
        on_answer: Callable[[HookRequest, HookResponse], None] | None,
    ) -> None:
        self._infos = infos
        self._hooks = hooks
        self._settings = settings
        self._on_answer = on_answer
        self.queues = Queues(self._work, settings.delivery_pool, self._queue_ended)
        self._claims = Claims(infos, settings.delivery_lease)
        self._woken: dict[str, None] = {}
        #: Transports with more events than there were slots.
        self._backlog: set[str] = set()
        self._poll_at = self._renew_at = self._strangers_at = 0.0
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tuswsgi-delivery", daemon=True)
        self._thread.start()

    def wake(self, upload: str) -> None:
        if len(self._woken) < _MOST_WOKEN:
            self._woken[upload] = None
            self._news.set()

    def stop(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._news.set()
        self._thread.join(timeout)
        if not self.queues.join(max(0.0, deadline - time.monotonic())):
            log.info("Some post-hooks are left to other workers")
        try:
            self._claims.give_up()
        except Exception as error:
            log.info("Claims on events could not be given up, they run out: %s", error)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._news.clear()
            try:
                self._step()
            except Exception as error:
                failures += 1
                if failures == 1:
                    text = "Post-hooks wait, they cannot be delivered now: %s"
                    log.warning(text, _cause(error), exc_info=_surprise(error))
                pause = _BACKOFF.after(failures)
                self._stopping.wait(min(pause, self._settings.delivery_lease / 3))
                continue
            if failures:
                log.info("Post-hooks can be delivered again")
                failures = 0
            # Without transports there is only what earlier ones may have left.
            next_step = min(self._poll_at, self._renew_at) if self._hooks else self._strangers_at
            self._news.wait(max(0.0, next_step - time.monotonic()))

    def _step(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            self._claims.renew()
            self._renew_at = now + self._settings.delivery_lease / 3
        transports = list(dict.fromkeys(hook.name for hook in self._hooks))
        for upload in list(self._woken):  # those that come meanwhile must not keep us here
            self._begin_woken(upload, transports)
        if now >= self._poll_at:
            self._backlog.update(transports)
            self._poll_at = now + jitter(*_POLL)
        for transport in self._backlog.intersection(transports):
            self._begin(transport)
        if now >= self._strangers_at:
            self._bury_strangers(transports)
            self._strangers_at = now + _STRANGERS_PAUSE

    def _begin_woken(self, upload: str, transports: Sequence[str]) -> None:
        # Before the claims: there may be news of it in the meantime.
        del self._woken[upload]
        try:
            for transport in transports:
                self._begin(transport, upload)
        except Exception:
            self.wake(upload)
            raise

    def _begin(self, transport: str, upload: str | None = None) -> None:
        """Claim as many events as can be delivered at once: who claims more than that keeps
        other workers from them.
        """
        free = self.queues.free(transport)
        if not free or self._stopping.is_set():
            self._backlog.add(transport)
            return
        events = self._claims.claim(transport, upload, free)
        if upload is None and len(events) < free:
            self._backlog.discard(transport)
        for place, event in enumerate(events):
            try:
                self.queues.add_event(event)
            except RuntimeError:
                # Nobody works on this one and those after it.
                self._claims.give_back(events[place:])
                raise

    def _bury_strangers(self, transports: Sequence[str]) -> None:
        """Put events to the dead letters whose transport is not configured (any more)."""
        youngest = time.time() - _STRANGERS_AGE
        for event in self._infos.outbox(dead=False, limit=200):
            if event.transport not in transports and event.created_at < youngest:
                for one in self._claims.claim(event.transport, event.upload, 1):
                    reason = f"There is no transport {one.transport} in the configuration"
                    self._put_back(replace(one, error=reason, dead=True))

    def _queue_ended(self, transport: str) -> None:
        if transport in self._backlog:
            self._news.set()

    def _work(self, job: Job) -> Event | None:
        if isinstance(job, Once):
            self._send(job)
            return None
        try:
            return self._deliver(job)
        except Exception:
            # Whatever broke, it must not hold the event for as long as this process lives.
            self._claims.give_back([job])
            raise

    def _deliver(self, event: Event) -> Event | None:
        """Deliver an event and return the next one of its queue."""
        hook = next(hook for hook in self._hooks if hook.name == event.transport)
        try:
            request = request_of(event)
            answer = hook.call(request)
        except Exception as error:
            event = self._failed(event, error)
            self._put_back(event)
            if not event.dead:
                return None
        else:
            self._keep_trying(self._claims.settle, event)
            self._heed(hook, request, answer)
        return self._after(event)

    def _after(self, event: Event) -> Event | None:
        if self._stopping.is_set():
            return None
        try:
            return next(iter(self._claims.claim(event.transport, event.upload, 1)), None)
        except Exception:
            # The dispatcher gets to see the same and tells of it.
            self.wake(event.upload)
            return None

    def _failed(self, event: Event, error: Exception) -> Event:
        attempts = event.attempts + 1
        dead = attempts >= self._settings.delivery_attempts or self._lasts(event, error)
        due_at = time.time() + self._settings.pause(attempts)
        log.log(
            logging.WARNING if attempts == 1 else logging.DEBUG,
            "%s failed (attempt %d): %s",
            _name(event),
            attempts,
            _cause(error),
            exc_info=None if isinstance(error, CorruptRecord) else _surprise(error),
        )
        return replace(event, attempts=attempts, due_at=due_at, error=_cause(error), dead=dead)

    def _lasts(self, event: Event, error: Exception) -> bool:
        """Return whether no further attempt will help, after one that failed."""
        if isinstance(error, CorruptRecord):
            return True  # what cannot be read today cannot be read tomorrow
        if not isinstance(error, LastingFailure):
            return False
        # What stands before a receiver that starts may say 404 once, after much else.
        is_again = event.error is None or event.error.startswith(_REFUSED)
        return is_again and event.attempts + 1 >= self._settings.delivery_refusals

    def _put_back(self, event: Event) -> None:
        if event.dead:
            log.error("%s is a dead letter now (%s): %s", _name(event), event.id, event.error)
        self._keep_trying(self._claims.put_back, event)

    def _keep_trying(self, write: Callable[[Event], None], event: Event) -> None:
        """Write what became of an event. As long as that fails, its claim is kept: the
        event would be delivered again.
        """
        for attempts, pause in enumerate(_BACKOFF, 1):
            try:
                write(event)
                return
            except Exception as error:
                if attempts == 1:
                    log.warning("%s is written off later: %s", _name(event), _cause(error))
                if self._stopping.wait(pause):
                    return

    def _send(self, once: Once) -> None:
        hook = once.hook
        request = once.request
        try:
            if once.is_progress and self._infos.events(request.info.id):
                log.debug("Progress of %s is dropped for its events", request.info.id)
                return
            answer = hook.call(request)
        except Exception as error:
            name = _name_of(hook, request)
            log.warning("%s failed: %s", name, _cause(error), exc_info=_surprise(error))
            return
        self._heed(hook, request, answer)

    def _heed(self, hook: Hook, request: HookRequest, answer: HookResponse | None) -> None:
        if answer is None or answer == HookResponse():
            return
        if not (answer.stop and request.type is HookType.POST_RECEIVE and self._on_answer):
            log.info("%s: the answer comes too late to change anything", _name_of(hook, request))
            return
        try:
            self._on_answer(request, answer)
        except Exception:
            log.exception("The upload %s could not be stopped", request.info.id)


def _name(event: Event) -> str:
    return f"{event.type} of {event.upload} by {event.transport}"


def _name_of(hook: Hook, request: HookRequest) -> str:
    return f"{request.type} of {request.info.id} by {hook.name}"


def _surprise(error: Exception) -> Exception | None:
    """Return an error whose place in the code is worth a look."""
    return None if isinstance(error, TusError) else error


def _cause(error: Exception) -> str:
    """Say in one line why something failed, as it may be shown to anybody."""
    cause = error.__cause__ or error
    text = str(cause) if isinstance(cause, TusError) else f"{type(cause).__name__}: {cause}"
    text = f"{_REFUSED}{text}" if isinstance(error, LastingFailure) else text
    return printable(" ".join(without_secrets(text).split()))[:_ERROR_LENGTH]
