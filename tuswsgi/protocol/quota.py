"""The quota: how many bytes all uploads together may take.

A record counts with what it promises, the length of its upload, whether the bytes have arrived
or not. So the quota holds among all processes and hosts that share the records: one at a time
adds the promises up and writes the record that promises more. A promise survives the death of
any process; it ends when the upload is removed. Without `max_total_size` the quota only writes
the records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from tuswsgi.core.errors import LimitReached, TusError, UploadLocked
from tuswsgi.core.events import Event, RequestInfo
from tuswsgi.core.info import FileInfo, State
from tuswsgi.core.options import MiB, Size, option
from tuswsgi.core.process import let_others_run
from tuswsgi.protocol.context import Context

log = logging.getLogger(__name__)

#: The lock under which promises are added up and made.
_LOCK = "tuswsgi-limit"

#: How many bytes are reserved at once for a body of unknown length.
_STEP = 16 * MiB

#: More bytes are reserved when fewer than these are left.
_MARGIN = 4 * MiB

#: Only uploads in these states are evicted.
_FINISHED = (State.FINISHED, State.REFUSED)

_NO_LIMIT = nullcontext()


@dataclass(frozen=True)
class QuotaSettings:
    """A limit for all uploads together."""

    section: ClassVar[str] = "limited"

    max_total_size: int | None = option(
        None,
        "How many bytes all uploads together may take; each counts with its length, whether its "
        "bytes have arrived or not. An upload that does not fit is refused (507) until others are "
        "removed. Unset: no limit.",
        kind=Size,
    )
    evict: bool = option(
        False,
        "If an upload does not fit, remove finished ones, the oldest first, and send "
        "post-terminate. Uploads with undelivered hooks stay, and so do parts that a final upload "
        "waits for.",
    )


class Limit(NamedTuple):
    """How many bytes a body may bring, and the error of the byte after them.

    Most bodies keep within it, so the error is a class where its message says enough.
    """

    size: int
    error: TusError | type[TusError]


class Quota:
    """The quota of one server."""

    def __init__(self, context: Context, settings: QuotaSettings) -> None:
        self._context = context
        self._max_total_size = settings.max_total_size
        self._evict = settings.evict
        self.is_limited = settings.max_total_size is not None

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        """Write the record of a new upload.

        :raises LimitReached: if the upload does not fit.
        """
        with self._promising(info, 0):
            self._context.infos.create(info, events)

    def save(self, info: FileInfo, **changes: Any) -> FileInfo:
        """Save a record with changes that may promise more.

        :param info: the record as it is in the store.
        :raises LimitReached: if they do not fit; nothing is written.
        """
        changed = info.replace(**changes)
        with self._promising(changed, info.promised):
            return self._context.infos.save(changed)

    def _promising(self, info: FileInfo, before: int) -> AbstractContextManager[None]:
        """Keep other processes from promising anything while the record `info` is written.

        :param before: what the record in the store promises.
        """
        limit = self._max_total_size
        return _NO_LIMIT if limit is None else self._promising_within(limit, info, before)

    @contextmanager
    def _promising_within(self, limit: int, info: FileInfo, before: int) -> Iterator[None]:
        with self._context.locker.lock(_LOCK) as hold:
            used = self._context.infos.usage() - before
            missing = used + info.promised - limit
            if missing > 0 and self._evict and info.promised <= limit:
                freed = self._free(missing, info)
                used -= freed
                missing -= freed
            if missing > 0 and info.promised > before:
                raise LimitReached(limit, used, info.promised)
            hold.check()
            yield

    def _free(self, missing: int, info: FileInfo) -> int:
        """Evict finished uploads, the oldest first, until `missing` bytes are free.

        None is evicted if all of them together are too small. The parts of `info` stay.

        :returns: how many bytes were freed.
        """
        candidates = []
        for state in _FINISHED:
            for found in self._context.infos.scan(state):
                if found.promised and found.id not in info.partial_uploads:
                    candidates.append((found.finished_at or 0.0, found.id, found.promised))
        if sum(size for _, _, size in candidates) < missing:
            return 0
        freed = 0
        for _, id, _ in sorted(candidates):
            if freed >= missing:
                break
            freed += self._evict_one(id)
            let_others_run()
        return freed

    def _evict_one(self, id: str) -> int:
        """Remove an upload and return its size; 0 if it is in use, or still needed."""
        infos = self._context.infos
        try:
            with self._context.locker.try_lock(id) as hold:
                info = infos.load(id)
                is_needed = infos.finals_waiting_for(id) or infos.events(id)
                if info.state not in _FINISHED or is_needed or infos.events(id, dead=True):
                    return 0
                self._context.remove(info, State.TERMINATED, RequestInfo(), hold)
        except UploadLocked:
            return 0
        except TusError as error:
            log.info("The upload %s was not evicted: %s", id, error)
            return 0
        except Exception:
            log.exception("The upload %s could not be evicted", id)
            return 0
        log.info("The upload %s was evicted to make room for others", id)
        return info.promised


class Reservation:
    """Bytes that are reserved for a body while the length of its upload is deferred.

    For a body of unknown length some are reserved at a time. If the quota is used up, the body
    may bring the bytes that are left.

    :param offset: where the body begins.
    :param length: of the body; ``None`` if unknown.
    :param limit: of the body, apart from the quota.
    """

    def __init__(self, quota: Quota, offset: int, length: int | None, limit: Limit) -> None:
        self._quota = quota
        self._offset = offset
        self._length = length
        self._most = limit
        self._may_grow = True
        #: What the body may bring by now.
        self.limit = Limit(0, limit.error)

    def is_used_up(self, received: int) -> bool:
        """Return whether to ``extend`` before more bytes arrive."""
        return self._may_grow and received > self.limit.size - _MARGIN

    def extend(self, info: FileInfo, received: int) -> FileInfo:
        """Reserve bytes for what comes next, and return the record that promises them.

        :raises LimitReached: if a body of known length does not fit.
        """
        error: TusError | type[TusError] = self._most.error
        wanted = received + _STEP if self._length is None else self._length
        end = self._offset + min(wanted, self._most.size)
        while end > info.promised:
            try:
                info = self._quota.save(info, reserved=end)
            except LimitReached as full:
                if self._length is not None:
                    raise
                error = full
                end = full.left
        size = min(max(0, info.promised - self._offset), self._most.size)
        self.limit = Limit(size, error)
        is_final = error is not self._most.error or size == self._most.size
        self._may_grow = self._length is None and not is_final
        return info
