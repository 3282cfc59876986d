"""The post-create of a POST that is still running, held back until the POST ends.

rustus sends a post-create only if the POST did not complete the upload, which is known only
at its end. The event is written with the record nevertheless, due later: if the process dies,
it becomes due and is delivered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo
from tuswsgi.infostores.base import EventStore

log = logging.getLogger(__name__)

#: The least time between two writes that hold the event back for longer, in seconds.
_INTERVAL = 10.0


class HeldPostCreate:
    """The post-create events of a POST that is still running, one per transport.

    :param silence: the longest time between two calls of ``prolong``, in seconds; 0 if the
        events are not held back at all.
    :ivar events: what to write with the record.
    :ivar holds: whether they are held back.
    """

    def __init__(self, infos: EventStore, events: Sequence[Event], silence: float) -> None:
        self.holds = silence > 0
        self._infos = infos
        self._seconds = silence + 2 * _INTERVAL
        self._held_at = time.monotonic()
        due_at = time.time() + self._seconds if self.holds else 0.0
        self.events = [replace(event, due_at=due_at) for event in events]

    def prolong(self, info: FileInfo) -> None:
        """Hold the events back for longer; called while bytes arrive."""
        now = time.monotonic()
        if self.holds and now - self._held_at >= _INTERVAL:
            self._held_at = now
            self._postpone(time.time() + self._seconds)

    def free(self) -> None:
        """Make the events due now."""
        self._postpone(0.0)

    def drop(self) -> None:
        """Withdraw the events: they are never delivered."""
        try:
            for event in self.events:
                self._infos.settle(event)
        except Exception:
            log.exception("A post-create could not be withdrawn, it will be delivered")

    def _postpone(self, due_at: float) -> None:
        try:
            for event in self.events:
                self._infos.put_back(replace(event, due_at=due_at))
        except Exception:
            log.exception("A post-create could not be rescheduled, it may come early or late")
