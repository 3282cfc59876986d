"""A record with its events and the claims on them, for stores that keep these together.

What may be claimed is decided here, and how it looks as one text; where it is kept, and how
its writers exclude each other, is the business of the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo
from tuswsgi.infostores import record
from tuswsgi.infostores.base import first_events


@dataclass
class Kept:
    """What is kept of an upload.

    :param events: in their order.
    :param claims: who holds an event and until when, by the event's id and transport.
    """

    info: FileInfo
    events: list[Event] = field(default_factory=list)
    claims: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def decode(cls, text: str | bytes) -> Kept:
        """Return what ``encode`` made a text of.

        :raises CorruptRecord: if `text` is something else.
        """
        data = record.decode(text)
        kept = cls(record.load(data))
        try:
            for item in data.get("events", ()):
                event = record.load_event(item)
                kept.events.append(event)
                if "claimed_by" in item:
                    claim = (item["claimed_by"], item["claimed_until"])
                    kept.claims[event.id, event.transport] = claim
        except (KeyError, TypeError) as error:
            raise record.CorruptRecord(f"Not events of an upload: {error!r}") from error
        return kept

    def encode(self) -> str:
        """Return JSON of one line, in ASCII."""
        data = record.dump(self.info)
        data["events"] = [self._dump(event) for event in self.events]
        return record.encode(data)

    def add(self, events: Sequence[Event]) -> None:
        """Add new events, each where its sequence wants it to be."""
        self.events = sorted([*self.events, *events], key=lambda event: event.sequence)

    def undelivered(self, *, dead: bool) -> list[Event]:
        """Return the events that were given up, or those that were not."""
        return [event for event in self.events if event.dead is dead]

    def is_over(self, sequence: int) -> bool:
        """Return whether this is the tombstone with this sequence, without any event."""
        return self.info.is_gone and self.info.sequence == sequence and not self.events

    def free(self, now: float, transport: str | None = None) -> list[Event]:
        """Return the events that can be claimed at the time `now`."""
        return [
            event
            for event in first_events(self.events)
            if transport in (None, event.transport) and self._free_at(event) <= now
        ]

    def free_at(self) -> float | None:
        """Return from when on an event can be claimed, ``None`` if all of them are dead."""
        return min(self.free_by_transport().values(), default=None)

    def free_by_transport(self) -> dict[str, float]:
        """Return from when on an event of each transport can be claimed."""
        return {event.transport: self._free_at(event) for event in first_events(self.events)}

    def claim(self, events: Sequence[Event], worker: str, until: float) -> None:
        """Claim `events` for `worker`."""
        self.claims.update({(event.id, event.transport): (worker, until) for event in events})

    def renew(self, worker: str, until: float) -> bool:
        """Let the claims of `worker` end at `until`; return whether it has any."""
        held = [key for key, (holder, _) in self.claims.items() if holder == worker]
        self.claims.update(dict.fromkeys(held, (worker, until)))
        return bool(held)

    def holder(self, event: Event) -> str | None:
        """Return who has claimed an event last, ``None`` if nobody has."""
        claim = self.claims.get((event.id, event.transport))
        return None if claim is None else claim[0]

    def is_held_by(self, worker: str) -> bool:
        """Return whether `worker` has any claims."""
        return any(holder == worker for holder, _ in self.claims.values())

    def replace(self, old: Event, new: Sequence[Event]) -> bool:
        """Put `new` where the event `old` is and give up the claim on it; return whether
        there was one.
        """
        for place, event in enumerate(self.events):
            if (event.id, event.transport) == (old.id, old.transport):
                self.events[place : place + 1] = new
                self.claims.pop((old.id, old.transport), None)
                return True
        return False

    def _free_at(self, event: Event) -> float:
        _, until = self.claims.get((event.id, event.transport), ("", 0.0))
        return max(event.due_at, until)

    def _dump(self, event: Event) -> dict[str, Any]:
        data = record.dump_event(event)
        if claim := self.claims.get((event.id, event.transport)):
            data["claimed_by"], data["claimed_until"] = claim
        return data
