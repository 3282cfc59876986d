"""A single attempt to send a post-hook, and its consequences.

An event that is delivered is removed. One that fails is put back and retried after a pause, or
becomes a dead letter: it is kept for the operator, and the next event of its upload is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.display import printable, without_secrets
from tuswsgi.core.errors import TusError
from tuswsgi.core.events import Event, HookType
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse
from tuswsgi.hooks.retries import PermanentFailure
from tuswsgi.infostores.base import EventStore
from tuswsgi.infostores.record import CorruptRecord
from tuswsgi.outbox.claims import Claims
from tuswsgi.outbox.events import request_of
from tuswsgi.outbox.queues import OneShot
from tuswsgi.outbox.settings import DeliverySettings

log = logging.getLogger(__name__)

#: Called with a post-receive hook whose answer stops its upload.
OnAnswer = Callable[[HookRequest, HookResponse], None]

#: Characters of an error that are stored with its event.
_ERROR_LENGTH = 500

#: How the stored error of a refusal begins.
_REFUSED = "Refused: "

#: The pauses between attempts to store the outcome of an event.
_WRITE_PAUSES = Backoff(first=0.1, longest=5.0)


class Sender:
    """Sends post-hooks and stores the outcome. May be called from many threads.

    :param hooks: the transports; may be added to later.
    :param stopping: set when the process stops; writes are not retried then.
    """

    def __init__(
        self,
        events: EventStore,
        hooks: Sequence[Hook],
        settings: DeliverySettings,
        claims: Claims,
        on_answer: OnAnswer,
        stopping: threading.Event,
    ) -> None:
        self._events = events
        self._hooks = hooks
        self._settings = settings
        self._claims = claims
        self._on_answer = on_answer
        self._stopping = stopping

    def deliver(self, event: Event) -> bool:
        """Try to deliver an event that this process has claimed.

        :returns: whether the next event of its upload can be sent: this one is delivered or dead.
        """
        hook = next(hook for hook in self._hooks if hook.name == event.transport)
        try:
            request = request_of(event)
            answer = hook.call(request)
        except Exception as error:
            event = self._failed(event, error)
            self._put_back(event)
            return event.dead
        self._write(self._claims.settle, event)
        self._handle_answer(hook, request, answer)
        return True

    def send_once(self, shot: OneShot) -> None:
        """Try to send a post-hook that is not recorded."""
        try:
            if shot.is_progress and self._events.events(shot.request.info.id):
                log.debug("%s is dropped, its upload has events to be delivered first", shot)
                return
            answer = shot.hook.call(shot.request)
        except Exception as error:
            log.warning("%s failed: %s", shot, describe(error), exc_info=unexpected(error))
            return
        self._handle_answer(shot.hook, shot.request, answer)

    def bury(self, event: Event, reason: str) -> None:
        """Make a dead letter of an event that this process has claimed."""
        self._put_back(replace(event, error=reason, dead=True))

    def _failed(self, event: Event, error: Exception) -> Event:
        attempts = event.attempts + 1
        dead = attempts >= self._settings.delivery_attempts or self._is_hopeless(event, error)
        due_at = time.time() + self._settings.backoff.after(attempts)
        log.log(
            logging.WARNING if attempts == 1 else logging.DEBUG,
            "%s failed (attempt %d): %s",
            _name(event),
            attempts,
            describe(error),
            exc_info=unexpected(error),
        )
        return replace(event, attempts=attempts, due_at=due_at, error=describe(error), dead=dead)

    def _is_hopeless(self, event: Event, error: Exception) -> bool:
        if isinstance(error, CorruptRecord):
            return True
        if not isinstance(error, PermanentFailure):
            return False
        # A proxy may answer 404 once while the receiver starts, after many other failures.
        is_repeated = event.error is None or event.error.startswith(_REFUSED)
        return is_repeated and event.attempts + 1 >= self._settings.delivery_refusals

    def _put_back(self, event: Event) -> None:
        if event.dead:
            log.error("%s is a dead letter now (%s): %s", _name(event), event.id, event.error)
        self._write(self._claims.put_back, event)

    def _write(self, write: Callable[[Event], None], event: Event) -> None:
        """Store the outcome of an event, and keep the claim on it until that succeeds: otherwise
        it would be delivered again.
        """
        for attempt, pause in enumerate(_WRITE_PAUSES):
            try:
                write(event)
                return
            except Exception as error:
                if attempt == 0:
                    text = "The outcome of %s cannot be stored now, retrying: %s"
                    log.warning(text, _name(event), describe(error))
            if self._stopping.wait(pause):
                return

    def _handle_answer(self, hook: Hook, request: HookRequest, answer: HookResponse | None) -> None:
        if answer is None or answer == HookResponse():
            return
        if not answer.stop or request.type is not HookType.POST_RECEIVE:
            text = "%s of %s by %s: the answer comes too late to change anything"
            log.info(text, request.type, request.info.id, hook.name)
            return
        try:
            self._on_answer(request, answer)
        except Exception:
            log.exception("The upload %s could not be stopped", request.info.id)


def _name(event: Event) -> str:
    return f"{event.type} of {event.upload} by {event.transport}"


def unexpected(error: Exception) -> Exception | None:
    """Return an error whose traceback is worth logging."""
    return None if isinstance(error, (TusError, CorruptRecord)) else error


def describe(error: Exception) -> str:
    """Return the cause of an error in one line, without secrets."""
    cause = error.__cause__ or error
    text = str(cause) if isinstance(cause, TusError) else f"{type(cause).__name__}: {cause}"
    text = f"{_REFUSED}{text}" if isinstance(error, PermanentFailure) else text
    return printable(" ".join(without_secrets(text).split()))[:_ERROR_LENGTH]
