"""The post-create of an upload whose record is written before its bytes arrive.

rustus sends no post-create if the POST completes the upload, which is known only when the POST
ends. Until then its events are held back: they are written with the record, but due later,
and rescheduled while bytes arrive. If the process dies, they become due and are delivered.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.outbox.outbox import Outbox

log = logging.getLogger(__name__)

#: The least time between two writes that reschedule the events, in seconds.
_INTERVAL = 10.0


class PostCreate:
    """The post-create of a POST, delivered at once or held back until the POST ends.

    :param silence: the longest time between two calls of ``prolong``, in seconds; ``None`` to
        deliver it at once.
    :ivar events: the events to write with the record.
    """

    def __init__(
        self, outbox: Outbox, info: FileInfo, request: RequestInfo, silence: float | None
    ) -> None:
        self._outbox = outbox
        self._request = request
        self._delay = None if silence is None else silence + 2 * _INTERVAL
        self._held_at = time.monotonic()
        self.events = outbox.events_for(HookType.POST_CREATE, info, request)
        if self._delay is not None:
            due_at = time.time() + self._delay
            self.events = [replace(event, due_at=due_at) for event in self.events]

    def begin(self, info: FileInfo) -> None:
        """Deliver it unless it is held back. The events are committed."""
        if self._delay is None:
            self._outbox.tell(HookType.POST_CREATE, info, self._request)

    def prolong(self, info: FileInfo) -> None:
        """Hold it back for longer, because bytes have arrived."""
        now = time.monotonic()
        if self._delay is not None and now - self._held_at >= _INTERVAL:
            self._held_at = now
            self._reschedule(time.time() + self._delay)

    def end(self, info: FileInfo, *, is_reported: bool) -> None:
        """Deliver or withdraw it if it was held back. The POST has ended.

        :param is_reported: whether to deliver it.
        """
        if self._delay is None:
            return
        if is_reported:
            self._reschedule(0.0)
            self._outbox.tell(HookType.POST_CREATE, info, self._request)
        else:
            self._withdraw()
            self._outbox.wake(info.id)

    def _reschedule(self, due_at: float) -> None:
        try:
            for event in self.events:
                self._outbox.store.put_back(replace(event, due_at=due_at))
        except Exception:
            log.exception("A post-create could not be rescheduled, it may come early or late")

    def _withdraw(self) -> None:
        try:
            for event in self.events:
                self._outbox.store.settle(event)
        except Exception:
            log.exception("A post-create could not be withdrawn, it will be delivered")


def deliver_held(outbox: Outbox, upload: str) -> None:
    """Deliver the post-create of an upload whose POST was cut off by a crash."""
    now = time.time()
    for event in outbox.store.events(upload):
        if event.type is HookType.POST_CREATE and event.due_at > now:
            outbox.store.put_back(replace(event, due_at=0.0))
    outbox.wake(upload)
