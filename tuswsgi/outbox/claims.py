"""The claims of one process on the events of an info store.

A claim keeps other processes from an event while it is being delivered here. It is renewed
as long as somebody works on the event, and only then: whatever goes wrong, it runs out.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from uuid import uuid4

from tuswsgi.core.events import Event
from tuswsgi.infostores.base import InfoStore


class Claims:
    """The claims of one process.

    :param lease: how long a claim holds if it is not renewed, in seconds.
    """

    def __init__(self, infos: InfoStore, lease: float) -> None:
        self._infos = infos
        self._lease = lease
        self._worker = _new_worker()
        #: By which name the events are claimed that are being delivered.
        self._held: dict[tuple[str, str], str] = {}

    def claim(self, transport: str, upload: str | None, limit: int) -> Sequence[Event]:
        """Claim events that are due; see ``InfoStore.claim``."""
        worker = self._worker
        now = time.time()
        try:
            events = self._infos.claim(
                worker, now, now + self._lease, upload=upload, transport=transport, limit=limit
            )
        except Exception:
            # It may have been done all the same.
            self.abandon()
            raise
        for event in events:
            self._held[event.id, event.transport] = worker
        return events

    def settle(self, event: Event) -> None:
        """Forget an event that was delivered."""
        self._infos.settle(event)
        self._held.pop((event.id, event.transport), None)

    def put_back(self, event: Event) -> None:
        """Keep an event for later, with what has become of it."""
        self._infos.put_back(event)
        self._held.pop((event.id, event.transport), None)

    def give_back(self, events: Sequence[Event]) -> None:
        """Let others have claimed events at once that nobody here works on.

        Where that cannot be written now, their claims run out.
        """
        for event in events:
            self._held.pop((event.id, event.transport), None)
        try:
            for event in events:
                self._infos.put_back(event)
        except Exception:
            self.abandon()
            raise

    def renew(self) -> None:
        """Hold the claims on all events that are being delivered."""
        self._renew(time.time() + self._lease)

    def give_up(self) -> None:
        """Let other processes have the events that are still being delivered."""
        self._renew(0.0)

    def abandon(self) -> None:
        """Claim by another name from now on: what was claimed by the old one without our
        knowledge is then not renewed for ever.
        """
        self._worker = _new_worker()

    def _renew(self, until: float) -> None:
        workers = list(self._held.values())
        for worker in dict.fromkeys(workers):
            self._infos.renew(worker, until)


def _new_worker() -> str:
    """Return a name that no other process has, and none before it."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid4().hex[:12]}"
