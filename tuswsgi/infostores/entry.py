"""An upload's record, its events and the claims on them, for stores that keep them together.

The stores decide where an entry is kept and exclude other writers while they change it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuswsgi.core.errors import InfoConflict
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo
from tuswsgi.infostores import record


@dataclass
class Entry:
    """What a store keeps of one upload.

    :param events: in the order of their delivery.
    :param claims: the worker that has claimed an event and the end of the claim, by the id and
        the transport of the event.
    """

    info: FileInfo
    events: list[Event] = field(default_factory=list)
    claims: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def new(cls, info: FileInfo, events: Sequence[Event]) -> Entry:
        """Return the entry of a new upload."""
        return cls(info, _sorted(events))

    @classmethod
    def decode(cls, text: str | bytes) -> Entry:
        """Return the entry that ``encode`` wrote.

        :raises CorruptRecord: if `text` is something else.
        """
        data = record.decode(text)
        entry = cls(record.load(data))
        try:
            for item in data.get("events", ()):
                event = record.load_event(item)
                entry.events.append(event)
                if "claimed_by" in item:
                    claim = (item["claimed_by"], item["claimed_until"])
                    entry.claims[event.id, event.transport] = claim
        except (KeyError, TypeError) as error:
            raise record.CorruptRecord(f"Not events of an upload: {error!r}") from error
        return entry

    def encode(self) -> str:
        """Return JSON of one line, in ASCII."""
        data = record.dump(self.info)
        data["events"] = [self._dump(event) for event in self.events]
        return record.encode(data)

    def save(self, info: FileInfo, events: Sequence[Event]) -> FileInfo:
        """Replace the record and add events; see ``RecordStore.save``."""
        if self.info.sequence != info.sequence:
            raise InfoConflict
        self.info = info.replace(sequence=info.sequence + 1)
        self.events = _sorted([*self.events, *events])
        return self.info

    @property
    def workers(self) -> set[str]:
        """The workers that have claimed events."""
        return {worker for worker, _ in self.claims.values()}

    def is_forgettable(self, sequence: int) -> bool:
        """Return whether this is a tombstone with this sequence and without events."""
        return self.info.is_gone and self.info.sequence == sequence and not self.events

    def undelivered(self, *, dead: bool) -> list[Event]:
        """Return the dead letters, or the events to be delivered."""
        return [event for event in self.events if event.dead is dead]

    def free_at(self) -> dict[str, float]:
        """Return the time from which on the next event of each transport can be claimed."""
        return {event.transport: self._free_at(event) for event in self._next_events()}

    def free(self, now: float, transport: str | None = None) -> list[Event]:
        """Return the events that can be claimed now."""
        return [
            event
            for event in self._next_events()
            if transport in (None, event.transport) and self._free_at(event) <= now
        ]

    def claim(
        self, worker: str, now: float, until: float, transport: str | None, limit: int
    ) -> list[Event]:
        """Claim events and return them; see ``EventStore.claim``."""
        events = self.free(now, transport)[:limit]
        self.claims.update({_key(event): (worker, until) for event in events})
        return events

    def renew(self, worker: str, until: float) -> bool:
        """Let the claims of `worker` end at `until`, and return whether there are any."""
        held = [key for key, (holder, _) in self.claims.items() if holder == worker]
        self.claims.update(dict.fromkeys(held, (worker, until)))
        return bool(held)

    def settle(self, event: Event) -> bool:
        """Remove an event, and return whether it was there."""
        return self._replace(event, [])

    def put_back(self, event: Event) -> bool:
        """Update an event, release the claim on it, and return whether it was there."""
        return self._replace(event, [event])

    def _replace(self, old: Event, new: Sequence[Event]) -> bool:
        for index, event in enumerate(self.events):
            if _key(event) == _key(old):
                self.events[index : index + 1] = new
                self.claims.pop(_key(old), None)
                return True
        return False

    def _next_events(self) -> Iterable[Event]:
        """Return the first event of each transport that is not dead."""
        first: dict[str, Event] = {}
        for event in self.events:
            if not event.dead:
                first.setdefault(event.transport, event)
        return first.values()

    def _free_at(self, event: Event) -> float:
        _, until = self.claims.get(_key(event), ("", 0.0))
        return max(event.due_at, until)

    def _dump(self, event: Event) -> dict[str, Any]:
        data = record.dump_event(event)
        if claim := self.claims.get(_key(event)):
            data["claimed_by"], data["claimed_until"] = claim
        return data


def oldest_events(entries: Iterable[Entry], *, dead: bool, limit: int) -> list[Event]:
    """Return events of many uploads; see ``EventStore.undelivered``."""
    events = (event for entry in entries for event in entry.undelivered(dead=dead))
    return heapq.nsmallest(limit, events, key=lambda event: event.created_at)


def _sorted(events: Iterable[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.sequence)


def _key(event: Event) -> tuple[str, str]:
    return event.id, event.transport
