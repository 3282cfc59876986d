"""``tuswsgi hooks``: lists undelivered post-hooks and retries dead letters.

It reads and writes the events in the info store, and leaves their delivery to the servers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from tuswsgi.commands.table import span, table
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.events import Event
from tuswsgi.infostores.base import EventStore, InfoStore, prepared
from tuswsgi.infostores.settings import InfoStoreName

#: The longest listing; it is held in memory.
_MANY = 100_000

_HEAD = ("ID", "EVENT", "UPLOAD", "TRANSPORT", "AGE", "ATTEMPTS", "NEXT TRY", "ERROR")


def opened(config: Config) -> AbstractContextManager[InfoStore]:
    """Open the configured info store.

    :raises ConfigurationError: if it cannot be used, or is in the memory of the server.
    """
    backends = Backends(config)
    if backends.info_store_name is InfoStoreName.MEMORY:
        raise ConfigurationError(
            "The post-hooks are in the server's memory, where no command can reach them."
        )
    backends.check_records()
    return prepared(backends.info_store())


def pending(infos: EventStore) -> Sequence[Event]:
    """Return the events to be delivered, oldest first."""
    return infos.undelivered(dead=False, limit=_MANY)


def dead(infos: EventStore) -> Sequence[Event]:
    """Return the dead letters, oldest first."""
    return infos.undelivered(dead=True, limit=_MANY)


def replay(infos: EventStore, id: str | None = None) -> int:
    """Let the servers deliver dead letters as if they were new.

    :param id: only those with this id, or of the upload with this id.
    :returns: their number.
    """
    events = [event for event in dead(infos) if id in (None, event.id, event.upload)]
    for event in events:
        infos.put_back(replace(event, dead=False, attempts=0, due_at=0.0))
    return len(events)


def as_json(events: Iterable[Event]) -> str:
    """Return events as JSON, without their payloads; times are in seconds since the epoch."""
    return json.dumps(
        [
            {
                "id": event.id,
                "event": event.type.value,
                "upload": event.upload,
                "sequence": event.sequence,
                "transport": event.transport,
                "created_at": event.created_at,
                "attempts": event.attempts,
                "due_at": None if event.dead else event.due_at,
                "error": event.error,
            }
            for event in events
        ],
        indent=2,
    )


def as_table(events: Iterable[Event]) -> str:
    """Return events as a table for people."""
    now = time.time()
    return table([_HEAD, *(_row(event, now) for event in events)])


def _row(event: Event, now: float) -> tuple[str, ...]:
    left = event.due_at - now
    due = "never" if event.dead else "now" if left <= 0 else f"in {span(left)}"
    return (
        event.id,
        event.type.value,
        event.upload,
        event.transport,
        span(now - event.created_at),
        str(event.attempts),
        due,
        event.error or "",
    )
