"""Records of uploads in the memory of one process: for tests, and for trying things out.

Nothing survives the process, and no other process sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from tuswsgi.core.errors import InfoConflict, UploadExists, UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.kept import Kept


class MemoryInfoStore(InfoStore):
    """Records in a dictionary. A record is frozen, so it is kept as it comes."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def prepare(self) -> None:
        pass

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        with self._lock:
            if info.id in self._kept:
                raise UploadExists
            kept = self._kept[info.id] = Kept(info)
            kept.add(events)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        with self._lock:
            kept = self._of(info.id)
            if kept.info.sequence != info.sequence:
                raise InfoConflict
            kept.info = info.replace(sequence=info.sequence + 1)
            kept.add(events)
            return kept.info

    def forget(self, info: FileInfo) -> bool:
        with self._lock:
            kept = self._kept.get(info.id)
            if kept is None or not kept.is_over(info.sequence):
                return False
            del self._kept[info.id]
            return True

    def load(self, id: str) -> FileInfo:
        return self._of(id).info

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        found = [
            info
            for info in self._infos()
            if info.id > after and (states is None or info.state in states)
        ]
        return sorted(found, key=lambda info: info.id)[:limit]

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found = [info.id for info in self._infos() if info.has_expired(now) and not info.is_gone]
        return found[:limit]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        return [
            info.id
            for info in self._infos()
            if info.state is State.WAITING and part in info.partial_uploads
        ]

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        with self._lock:
            kept = self._kept.get(id)
            return kept.undelivered(dead=dead) if kept else []

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
        with self._lock:
            uploads = self._kept if upload is None else {upload}.intersection(self._kept)
            free = [event for id in uploads for event in self._kept[id].free(now, transport)]
            free.sort(key=lambda event: (event.due_at, event.created_at))
            for event in free[:limit]:
                self._kept[event.upload].claim([event], worker, until)
        return free[:limit]

    def renew(self, worker: str, until: float) -> None:
        with self._lock:
            for kept in self._kept.values():
                kept.renew(worker, until)

    def settle(self, event: Event) -> None:
        self._replace(event, [])

    def put_back(self, event: Event) -> None:
        self._replace(event, [event])

    def outbox(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        with self._lock:
            found = [
                event for kept in self._kept.values() for event in kept.events if event.dead is dead
            ]
        return sorted(found, key=lambda event: event.created_at)[:limit]

    def _of(self, id: str) -> Kept:
        try:
            return self._kept[id]
        except KeyError:
            raise UploadNotFound from None

    def _infos(self) -> Sequence[FileInfo]:
        with self._lock:
            return [kept.info for kept in self._kept.values()]

    def _replace(self, old: Event, new: Sequence[Event]) -> None:
        with self._lock:
            if (kept := self._kept.get(old.upload)) is not None:
                kept.replace(old, new)
