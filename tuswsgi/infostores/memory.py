"""Records of uploads in the memory of one process: for tests, and for trying things out.

Nothing survives the process, and no other process sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from tuswsgi.errors import InfoConflict, UploadExists, UploadNotFound
from tuswsgi.hooks.base import Event
from tuswsgi.info import FileInfo, State
from tuswsgi.infostores.base import InfoStore


class MemoryInfoStore(InfoStore):
    """Records in a dictionary. A record is frozen, so it is kept as it comes."""

    def __init__(self) -> None:
        self._records: dict[str, FileInfo] = {}
        self._events: dict[str, list[Event]] = {}
        self._lock = threading.Lock()

    def prepare(self) -> None:
        pass

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        with self._lock:
            if info.id in self._records:
                raise UploadExists
            self._write(info, events)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        with self._lock:
            if self.load(info.id).sequence != info.sequence:
                raise InfoConflict
            saved = info.but(sequence=info.sequence + 1)
            self._write(saved, events)
            return saved

    def load(self, id: str) -> FileInfo:
        try:
            return self._records[id]
        except KeyError:
            raise UploadNotFound from None

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        with self._lock:
            found = [
                info
                for id, info in self._records.items()
                if id > after and (states is None or info.state in states)
            ]
        return sorted(found, key=lambda info: info.id)[:limit]

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        with self._lock:
            found = [
                id
                for id, info in self._records.items()
                if info.has_expired(now) and not info.is_gone
            ]
        return found[:limit]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        with self._lock:
            return [
                id
                for id, info in self._records.items()
                if info.state is State.WAITING and part in info.partial_uploads
            ]

    def events(self, id: str) -> Sequence[Event]:
        with self._lock:
            return sorted(self._events.get(id, ()), key=lambda event: event.sequence)

    def _write(self, info: FileInfo, events: Sequence[Event]) -> None:
        self._records[info.id] = info
        if events:
            self._events.setdefault(info.id, []).extend(events)
