"""The claims of one process on events.

A claim keeps other processes from an event while this one delivers it. It is renewed until
the delivery has ended; if this process dies, it expires and another process takes over.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from uuid import uuid4

from tuswsgi.core.events import Event
from tuswsgi.infostores.base import EventStore


class Claims:
    """The claims of one process.

    :param lease: how long a claim lasts unless it is renewed, in seconds.
    """

    def __init__(self, events: EventStore, lease: float) -> None:
        self._events = events
        self._lease = lease
        self._worker = _new_worker()
        #: The worker name of each claim.
        self._held: dict[tuple[str, str], str] = {}

    def claim(self, transport: str, upload: str | None, limit: int) -> Sequence[Event]:
        """Claim events that are due; see ``EventStore.claim``."""
        worker = self._worker
        now = time.time()
        try:
            events = self._events.claim(
                worker, now, now + self._lease, upload=upload, transport=transport, limit=limit
            )
        except Exception:
            self._change_worker()
            raise
        for event in events:
            self._held[event.id, event.transport] = worker
        return events

    def settle(self, event: Event) -> None:
        """Remove an event that was delivered."""
        self._events.settle(event)
        self._held.pop((event.id, event.transport), None)

    def put_back(self, event: Event) -> None:
        """Store the outcome of an event, and release the claim on it."""
        self._events.put_back(event)
        self._held.pop((event.id, event.transport), None)

    def release(self, events: Sequence[Event]) -> None:
        """Release the claims on events that this process does not deliver after all.

        If that fails, the claims expire.
        """
        for event in events:
            self._held.pop((event.id, event.transport), None)
        try:
            for event in events:
                self._events.put_back(event)
        except Exception:
            self._change_worker()
            raise

    def renew(self) -> None:
        """Renew all claims."""
        self._renew(time.time() + self._lease)

    def release_all(self) -> None:
        """Release all claims, although some events may still be in delivery."""
        self._renew(0.0)

    def _change_worker(self) -> None:
        """Claim under another name from now on.

        After an error there may be claims under the old name that this process does not know
        of. They must expire, so the old name is renewed only while known claims use it.
        """
        self._worker = _new_worker()

    def _renew(self, until: float) -> None:
        workers = list(self._held.values())
        for worker in dict.fromkeys(workers):
            self._events.renew(worker, until)


def _new_worker() -> str:
    """Return a name that no process has used before."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid4().hex[:12]}"
