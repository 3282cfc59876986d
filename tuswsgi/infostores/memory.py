"""Records of uploads in the memory of one process, for tests and trials.

They are lost with the process, and no other process sees them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from tuswsgi.core.errors import UploadExists, UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.entry import Entry, oldest_events


class MemoryInfoStore(InfoStore):
    """Records in a dictionary."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def prepare(self) -> None:
        pass

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        with self._lock:
            if info.id in self._entries:
                raise UploadExists
            self._entries[info.id] = Entry.new(info, events)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        with self._lock:
            return self._entry(info.id).save(info, events)

    def forget(self, info: FileInfo) -> bool:
        with self._lock:
            entry = self._entries.get(info.id)
            if entry is None or not entry.is_forgettable(info.sequence):
                return False
            del self._entries[info.id]
            return True

    def load(self, id: str) -> FileInfo:
        return self._entry(id).info

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        found = self._find(
            lambda info: info.id > after and (states is None or info.state in states)
        )
        return sorted(found, key=lambda info: info.id)[:limit]

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found = self._find(lambda info: info.has_expired(now) and not info.is_gone)
        return [info.id for info in found[:limit]]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        found = self._find(
            lambda info: info.state is State.WAITING and part in info.partial_uploads
        )
        return [info.id for info in found]

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        with self._lock:
            entry = self._entries.get(id)
            return entry.undelivered(dead=dead) if entry else []

    def claim(
        self,
        worker: str,
        now: float,
        until: float,
        *,
        upload: str | None = None,
        transport: str | None = None,
        limit: int = 100,
    ) -> Sequence[Event]:
        claimed: list[Event] = []
        with self._lock:
            for id in self._entries if upload is None else {upload}.intersection(self._entries):
                left = limit - len(claimed)
                claimed += self._entries[id].claim(worker, now, until, transport, left)
        return claimed

    def renew(self, worker: str, until: float) -> None:
        with self._lock:
            for entry in self._entries.values():
                entry.renew(worker, until)

    def settle(self, event: Event) -> None:
        with self._lock:
            if entry := self._entries.get(event.upload):
                entry.settle(event)

    def put_back(self, event: Event) -> None:
        with self._lock:
            if entry := self._entries.get(event.upload):
                entry.put_back(event)

    def undelivered(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        with self._lock:
            return oldest_events(self._entries.values(), dead=dead, limit=limit)

    def _entry(self, id: str) -> Entry:
        try:
            return self._entries[id]
        except KeyError:
            raise UploadNotFound from None

    def _find(self, condition: Callable[[FileInfo], bool]) -> Sequence[FileInfo]:
        with self._lock:
            return [entry.info for entry in self._entries.values() if condition(entry.info)]
