"""Promises room to uploads, in stores that bound it, and removes old ones where new ones need it.

Room is promised by a record, which is written before the bytes come. What is promised stays so
over the death of any process, until the upload is finished with less or gone. Without a bounded
store all of this is nothing but writing the record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuswsgi.core.errors import TusError, UploadLocked
from tuswsgi.core.events import Event, RequestInfo
from tuswsgi.core.info import FileInfo, State
from tuswsgi.core.process import let_others_run
from tuswsgi.datastores.base import DataStore
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Hold, Locker

log = logging.getLogger(__name__)

#: The states of uploads that may go: their bytes are all there.
_FINISHED = (State.FINISHED, State.REFUSED)


@dataclass(frozen=True)
class Room:
    """The room of one server's uploads.

    :param remove: removes an upload for good; its lock is held.
    """

    data: DataStore
    infos: InfoStore
    locker: Locker[Any]
    remove: Callable[[FileInfo, State, RequestInfo, Hold], FileInfo]

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        """Write the record of a new upload, if there is room for it.

        :raises LimitReached: if there is none.
        """
        with self.data.reserve(info, 0, self._make_room):
            self.infos.create(info, events)

    def save(self, info: FileInfo, **changes: Any) -> FileInfo:
        """Save a record with changes that promise more, if there is room for them.

        :param info: the record as it is in the store.
        :raises LimitReached: if there is none; nothing is changed.
        """
        changed = info.replace(**changes)
        with self.data.reserve(changed, info.promised, self._make_room):
            return self.infos.save(changed)

    def _make_room(self, missing: int, info: FileInfo) -> int:
        """Remove finished uploads, the oldest first, until `missing` bytes are free.

        Nothing is removed if all of them together would not do. An upload in use stays, and
        so do parts that a final upload waits for, or `info` itself, and what hooks are yet to
        be told of.

        :returns: how many bytes were freed.
        """
        candidates = []
        for state in _FINISHED:
            for found in self.infos.scan(state):
                if found.promised and found.id not in info.partial_uploads:
                    candidates.append((found.finished_at or 0.0, found.id, found.promised))
        if sum(size for _, _, size in candidates) < missing:
            return 0
        freed = 0
        for _, id, _ in sorted(candidates):
            if freed >= missing:
                break
            freed += self._evict(id)
            let_others_run()
        return freed

    def _is_wanted(self, id: str) -> bool:
        """Whether a final upload waits for it, or who is to be told of it wants to find it."""
        return bool(
            self.infos.finals_waiting_for(id)
            or self.infos.events(id)
            or self.infos.events(id, dead=True)
        )

    def _evict(self, id: str) -> int:
        try:
            with self.locker.try_lock(id) as hold:
                info = self.infos.load(id)
                if info.state not in _FINISHED or self._is_wanted(id):
                    return 0
                self.remove(info, State.TERMINATED, RequestInfo(), hold)
        except UploadLocked:
            return 0
        except TusError as error:
            log.info("The upload %s keeps its room: %s", id, error)
            return 0
        except Exception:
            log.exception("The upload %s could not be removed to make room", id)
            return 0
        log.info("The upload %s was removed to make room for others", id)
        return info.promised
