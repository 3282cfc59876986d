"""Receives the body of a POST or PATCH into the data store.

While the bytes arrive, the record of the upload is kept current: an upload that expires some
time after its last byte must not expire in the middle of a long body.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from tuswsgi.core.errors import (
    BodyTooLarge,
    InfoConflict,
    MaxSizeExceeded,
    OffsetMismatch,
    StorageFull,
    TusError,
    Unavailable,
    UploadGone,
    UploadInterrupted,
    UploadLocked,
    UploadSizeExceeded,
    UploadStopped,
)
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, State
from tuswsgi.datastores.base import OpenUpload
from tuswsgi.lockers.base import HELD, Hold
from tuswsgi.observing.signals import tell, upload_progress
from tuswsgi.observing.telemetry import bytes_received, report, upload_taken_over
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.quota import Limit, Quota, Reservation
from tuswsgi.transfer.reader import UploadReader

log = logging.getLogger(__name__)

#: Errors after which the client is to resume the upload.
_TEMPORARY = (Unavailable, StorageFull, UploadLocked)

#: The most seconds until it is looked at again how many bytes have arrived.
_LOOK_INTERVAL = 1.0

#: While bytes arrive the record is saved at this interval, in seconds: it tells an operator
#: which uploads stand still.
_SAVE_INTERVAL = 600.0

OnProgress = Callable[[FileInfo], None]


def take_over(context: Context, info: FileInfo, hold: Hold) -> FileInfo:
    """Make sure that only the holder of an upload's lock can change the upload.

    To be called by whoever gets the lock, before anything else. If the holder before lost the
    lock, it may still write: the upload is sealed, so that these bytes never count.

    :param info: the record as it was read under the lock.
    """
    if not hold.needs_fencing:
        return info
    if info.state is State.RECEIVING:
        info = context.infos.save(info.replace(storage=context.data.seal(info)))
        log.warning("%s was taken over from a holder that may still write: it is sealed", info.id)
    hold.confirm_fenced()
    return info


def stored_offset(context: Context, info: FileInfo, hold: Hold) -> int:
    """Return how many bytes of an unfinished upload are stored.

    :raises UploadGone: if its bytes are gone.
    :raises LockLost: if another process may have finished the upload meanwhile.
    """
    try:
        return context.data.offset(info)
    except UploadGone:
        hold.check()
        raise


def limit_of(context: Context, info: FileInfo, offset: int, length: int | None) -> Limit:
    """Return how many bytes a body may bring to an upload that has `offset` bytes.

    :param length: the announced length of the body, ``None`` if it is chunked.
    :raises MaxSizeExceeded, UploadSizeExceeded, BodyTooLarge: if more bytes are announced.
    """
    if info.size is None:
        limit = Limit(context.max_file_size - offset, MaxSizeExceeded)
    else:
        limit = Limit(info.size - offset, UploadSizeExceeded)
    max_body_size = context.settings.max_body_size
    if max_body_size is not None and max_body_size < limit.size:
        limit = Limit(max_body_size, BodyTooLarge)
    if length is not None and length > limit.size:
        raise limit.error
    return limit


def receive_nothing(context: Context, info: FileInfo, offset: int, reader: UploadReader) -> None:
    """Check the PATCH of a finished upload: a client may repeat the last one, without bytes."""
    if offset != info.offset:
        raise OffsetMismatch(info.offset)
    reader.limit(*limit_of(context, info, offset, reader.length))
    if not reader.is_empty:
        reader.read(1)
    if reader.error is not None:
        raise reader.error


def progress_interval(context: Context) -> float:
    """Return how often to tell of progress, in seconds; infinite if nothing listens."""
    hooks = context.hooks
    if upload_progress.receivers or (hooks.hooks and hooks.wants(HookType.POST_RECEIVE)):
        return hooks.progress_interval
    return math.inf


def tell_progress(context: Context, request: RequestInfo, info: FileInfo) -> None:
    """Send post-receive and the signal of progress."""
    if context.hooks.hooks:
        context.outbox.tell(HookType.POST_RECEIVE, info, request)
    if upload_progress.receivers:
        tell(upload_progress, context.sender, info)


class Reception:
    """Appends the body of one request to an upload, and keeps the record current meanwhile.

    The caller holds the lock and has read `offset` under it, or has just made the upload, so
    that no other process can know it.

    :param hold: the upload's lock.
    :param on_progress: called with the upload now and then while bytes arrive, and once they
        are saved if they do not complete it; ``None`` if there is no record yet.
    """

    def __init__(
        self,
        context: Context,
        quota: Quota,
        info: FileInfo,
        offset: int,
        reader: UploadReader,
        limit: Limit,
        hold: Hold = HELD,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._context = context
        self._info = info
        self._start = offset
        self._hold = hold
        self._tell = on_progress
        self._told: int | None = None
        self._failure: TusError | None = None
        self._reported = 0
        self._reader = reader
        self._reader.guard(hold)
        self._reader.limit(*limit)
        self._reader.on_progress = self._on_progress
        #: A store that forgets records is to get this one in the first half of its lifetime.
        lifetime = context.infos.lifetime
        self._save_interval = min(_SAVE_INTERVAL, math.inf if lifetime is None else lifetime / 4)
        self._look_interval = min(_LOOK_INTERVAL, self._save_interval)
        now = self._reader.last_progress
        self._look_at = now + self._look_interval
        self._tell_at = math.inf if on_progress is None else now + context.hooks.progress_interval
        self._reservation: Reservation | None = None
        if quota.is_limited and info.size is None and on_progress is not None:
            self._reservation = Reservation(quota, offset, reader.length, limit)

    @property
    def error(self) -> TusError | None:
        """Why not all bytes were stored; ``None`` if they were."""
        return self._failure or self._reader.error

    @property
    def fault(self) -> TusError | None:
        """The error if the client is not to resume the upload after it."""
        error = self.error
        return None if isinstance(error, _TEMPORARY) else error

    @property
    def is_stopped(self) -> bool:
        """Whether a hook has ended the upload."""
        return isinstance(self.error, UploadStopped)

    def completes(self, info: FileInfo) -> bool:
        """Return whether an upload that ``receive`` returned is to be finished."""
        return info.offset == info.size and self.fault is None

    def receive_first(self, upload: OpenUpload) -> FileInfo:
        """Append the body to a new upload, and return what to write as its record.

        :raises TusError: if the client is not to resume the upload.
        """
        offset = self._append(upload.append)
        if self.fault is not None:
            raise self.fault
        return self._with_bytes(self._info, offset) if offset else self._info

    def receive(self) -> FileInfo:
        """Append the body, and save the record unless the upload is complete or stopped.

        What arrives before an error counts; the caller looks at ``error``.

        :raises LockLost: if the lock was lost.
        :raises LimitReached: if the body does not fit.
        """
        context = self._context
        if context.infos.lifetime is not None and time.time() > self._save_at(self._info):
            # Its first bytes may take long to arrive.
            self._info = context.infos.save(self._info)
        self._reserve(0)
        self._schedule_progress()
        offset = self._append(
            lambda reader: context.data.append(self._info, self._start, reader, self._hold)
        )
        self._hold.check()
        was_reserved = self._info.reserved > 0
        info = self._info.replace(offset=offset, reserved=0)
        has_bytes = offset > self._start
        if has_bytes:
            info = self._with_bytes(info, offset)
        if self.is_stopped or self.completes(info):
            return info
        if has_bytes or was_reserved:
            info = context.infos.save(info)
        if self._tell is not None and offset != self._told and (has_bytes or self.error is None):
            self._tell(info)
        return info

    def _append(self, append: Callable[[UploadReader], int]) -> int:
        if self._reader.is_empty and not self._reader.provisional:
            return self._start
        try:
            return append(self._reader)
        except (StorageFull, Unavailable) as failure:
            self._failure = failure
            self._hold.check()
            return self._context.data.offset(self._info)
        finally:
            if bytes_received.receivers:
                self._report_bytes()
            if isinstance(self._reader.error, UploadInterrupted) and upload_taken_over.receivers:
                report(upload_taken_over, self._context.sender)

    def _on_progress(self) -> None:
        received = self._reader.received
        if self._reservation is not None and self._reservation.is_used_up(received):
            self._reserve(received)
        now = self._reader.last_progress
        if now < self._look_at and now < self._tell_at:
            return
        self._look_at = now + self._look_interval
        if bytes_received.receivers:
            self._report_bytes()
        if self._tell is None:
            return
        offset = self._start + received
        if time.time() > self._save_at(self._info):
            self._save(offset)
        if now >= self._tell_at:
            self._tell_at = now + self._context.hooks.progress_interval
            self._told = offset
            self._schedule_progress()
            self._tell(self._info.replace(offset=offset))

    def _save(self, offset: int) -> None:
        self._hold.check()
        try:
            self._info = self._context.infos.save(self._with_bytes(self._info, offset))
        except InfoConflict:
            raise  # another process has the lock
        except Unavailable:
            pass  # bytes can still be stored; it is tried again in a moment

    def _save_at(self, info: FileInfo) -> float:
        """Return when to write the record anew: at the interval, or when a quarter of the time
        to its expiry has passed.
        """
        saved_at = info.last_byte_at or info.created_at
        expiration = self._context.expiration
        if info.expires_at is None or expiration is None:
            return saved_at + self._save_interval
        return min(saved_at + self._save_interval, info.expires_at - expiration * 0.75)

    def _with_bytes(self, info: FileInfo, offset: int) -> FileInfo:
        now = time.time()
        expiration = self._context.expiration
        expires_at = None if expiration is None else now + expiration
        return info.replace(offset=offset, last_byte_at=now, expires_at=expires_at)

    def _reserve(self, received: int) -> None:
        if self._reservation is not None:
            self._info = self._reservation.extend(self._info, received)
            self._reader.limit(*self._reservation.limit)

    def _schedule_progress(self) -> None:
        """Have the reader take what has arrived of a slow body in time to tell of it."""
        interval = progress_interval(self._context)
        if interval < math.inf:
            self._reader.pace(self._tell_at, interval)

    def _report_bytes(self) -> None:
        size = self._reader.received - self._reported
        if size:
            self._reported += size
            report(bytes_received, self._context.sender, size=size)
