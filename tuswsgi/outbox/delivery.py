"""Delivers events in one process: decides which events it claims, and when.

Each transport sends the events of an upload in order and one at a time, whichever processes
deliver them. A slow or unavailable transport does not hold up the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from tuswsgi.core.backoff import Backoff, jitter
from tuswsgi.core.events import Event
from tuswsgi.hooks.base import Hook
from tuswsgi.infostores.base import EventStore
from tuswsgi.outbox.claims import Claims
from tuswsgi.outbox.queues import Job, OneShot, Queues
from tuswsgi.outbox.sending import OnAnswer, Sender, describe, unexpected
from tuswsgi.outbox.settings import DeliverySettings

log = logging.getLogger(__name__)

#: The least and the longest pause between two polls for due events, in seconds.
_POLL = (1.0, 2.0)

#: Seconds between two polls for events of unknown transports.
_UNKNOWN_PAUSE = 30.0

#: Seconds after which an event of an unknown transport becomes a dead letter. Until then, a
#: worker with a newer configuration may have written it while the server reloads.
_UNKNOWN_AGE = 60.0

#: How many woken uploads may wait; polls find the events of any others.
_MOST_WOKEN = 10_000


class Delivery:
    """The delivery of events in one process, from its construction to ``stop``.

    One thread claims events and renews the claims; it waits for the info store, never for a
    transport. The deliveries run in the threads of `queues`.

    :param hooks: the transports; may be added to later.
    """

    def __init__(
        self,
        events: EventStore,
        hooks: Sequence[Hook],
        settings: DeliverySettings,
        on_answer: OnAnswer,
    ) -> None:
        self._events = events
        self._hooks = hooks
        self._lease = settings.delivery_lease
        self._stopping = threading.Event()
        self._claims = Claims(events, self._lease)
        self._sender = Sender(events, hooks, settings, self._claims, on_answer, self._stopping)
        self.queues = Queues(self._work, settings.delivery_pool, self._queue_ended)
        self._woken: dict[str, None] = {}
        #: Transports that may have more due events than were claimed.
        self._backlog: set[str] = set()
        self._poll_at = self._renew_at = self._unknown_at = 0.0
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tuswsgi-delivery", daemon=True)
        self._thread.start()

    def wake(self, upload: str) -> None:
        """Look for events of `upload` soon."""
        if len(self._woken) < _MOST_WOKEN:
            self._woken[upload] = None
            self._news.set()

    def stop(self, timeout: float) -> None:
        """Begin no further delivery, and wait for those that are running.

        :param timeout: in seconds.
        """
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._news.set()
        self._thread.join(timeout)
        if not self.queues.join(max(0.0, deadline - time.monotonic())):
            log.info("Stopped before all post-hooks were delivered; other workers deliver the rest")
        try:
            self._claims.release_all()
        except Exception as error:
            log.info("The claims on events could not be released, they expire: %s", error)

    def _run(self) -> None:
        backoff = Backoff(first=0.2, longest=min(5.0, self._lease / 3))
        failures = 0
        while not self._stopping.is_set():
            self._news.clear()
            try:
                self._step()
            except Exception as error:
                failures += 1
                if failures == 1:
                    text = "Post-hooks cannot be delivered now, retrying: %s"
                    log.warning(text, describe(error), exc_info=unexpected(error))
                self._stopping.wait(backoff.after(failures))
                continue
            if failures:
                log.info("Post-hooks can be delivered again")
                failures = 0
            # Without transports, only events of unknown transports can be pending.
            next_step = min(self._poll_at, self._renew_at) if self._hooks else self._unknown_at
            self._news.wait(max(0.0, next_step - time.monotonic()))

    def _step(self) -> None:
        now = time.monotonic()
        if now >= self._renew_at:
            self._claims.renew()
            self._renew_at = now + self._lease / 3
        transports = list(dict.fromkeys(hook.name for hook in self._hooks))
        for upload in list(self._woken):  # a copy: those woken meanwhile wait for the next step
            self._begin_woken(upload, transports)
        if now >= self._poll_at:
            self._backlog.update(transports)
            self._poll_at = now + jitter(*_POLL)
        for transport in self._backlog.intersection(transports):
            self._begin(transport)
        if now >= self._unknown_at:
            self._bury_unknown(transports)
            self._unknown_at = now + _UNKNOWN_PAUSE

    def _begin_woken(self, upload: str, transports: Sequence[str]) -> None:
        # Before the claims: it may be woken again in the meantime.
        del self._woken[upload]
        try:
            for transport in transports:
                self._begin(transport, upload)
        except Exception:
            self.wake(upload)
            raise

    def _begin(self, transport: str, upload: str | None = None) -> None:
        """Claim as many events as can be delivered at once, and leave the rest to others."""
        free = self.queues.free(transport)
        if not free or self._stopping.is_set():
            self._backlog.add(transport)
            return
        events = self._claims.claim(transport, upload, free)
        if upload is None and len(events) < free:
            self._backlog.discard(transport)
        for number, event in enumerate(events):
            try:
                self.queues.add_event(event)
            except RuntimeError:
                self._claims.release(events[number:])
                raise

    def _bury_unknown(self, transports: Sequence[str]) -> None:
        """Make dead letters of events whose transport is no longer configured."""
        youngest = time.time() - _UNKNOWN_AGE
        for event in self._events.undelivered(dead=False, limit=200):
            if event.transport not in transports and event.created_at < youngest:
                for claimed in self._claims.claim(event.transport, event.upload, 1):
                    reason = f"There is no transport {event.transport} in the configuration"
                    self._sender.bury(claimed, reason)

    def _queue_ended(self, transport: str) -> None:
        if transport in self._backlog:
            self._news.set()

    def _work(self, job: Job) -> Event | None:
        """Do a job of a queue, and return the event that is next in the queue."""
        if isinstance(job, OneShot):
            self._sender.send_once(job)
            return None
        try:
            return self._next(job) if self._sender.deliver(job) else None
        except Exception:
            # Otherwise this process would renew the claim as long as it lives.
            self._claims.release([job])
            raise

    def _next(self, event: Event) -> Event | None:
        if self._stopping.is_set():
            return None
        try:
            return next(iter(self._claims.claim(event.transport, event.upload, 1)), None)
        except Exception:
            # The delivery thread tries again, and logs the error.
            self.wake(event.upload)
            return None
