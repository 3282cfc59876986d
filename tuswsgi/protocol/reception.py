"""One chunk of bytes on its way from a request into the data store.

It owns the limits that a body is held to, and the record's changes while bytes arrive: an
upload that expires after its last byte must not expire in the middle of a long body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tuswsgi.core.errors import (
    BodyTooLarge,
    InfoConflict,
    LimitReached,
    MaxSizeExceeded,
    OffsetMismatch,
    StorageFull,
    TusError,
    Unavailable,
    UploadInterrupted,
    UploadLocked,
    UploadSizeExceeded,
    UploadStopped,
)
from tuswsgi.core.events import Event, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.core.options import MiB
from tuswsgi.datastores.base import OpenPlace
from tuswsgi.hooks.base import HookResponse
from tuswsgi.lockers.base import SURE, Hold
from tuswsgi.observing.telemetry import bytes_received, report, upload_taken_over
from tuswsgi.protocol.finishing import Finisher
from tuswsgi.transfer.checksum import Checksum
from tuswsgi.transfer.reader import Body, UploadReader

#: Errors after which the client shall go on from where the upload stands.
_PASSING = (Unavailable, StorageFull, UploadLocked)

#: The most seconds between two looks at how far a body has come.
_LOOK_INTERVAL = 1.0

#: Seconds after which a record says anew that bytes still arrive.
_REFRESH = 600.0

#: How much room a body of unknown length is promised at once.
_GRANT = 16 * MiB

#: How much of that is left when it is promised more.
_MARGIN = 4 * MiB

#: Called with an upload as it is now.
OnProgress = Callable[[FileInfo], None]


class Chunk(NamedTuple):
    """The bytes that a POST or PATCH brings.

    :param checksum: what they must hash to.
    :param awaits_trailer: the checksum comes in a trailer.
    """

    body: Body
    checksum: Checksum | None = None
    awaits_trailer: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the request has no body; a chunked one is told from that by reading."""
        return self.body.length == 0


class Reception:
    """Receives one chunk.

    :param finisher: knows the stores, and what to do with a last byte.
    """

    def __init__(self, finisher: Finisher, chunk: Chunk) -> None:
        self._finisher = finisher
        self._settings = finisher.settings
        self._interval = finisher.hooks.progress_interval
        lifetime = finisher.infos.lifetime
        #: After how long a record is written anew while bytes arrive, and how often that is looked
        #: at: a store that forgets gets it in the first half of its life.
        self._refresh = _REFRESH if lifetime is None else min(_REFRESH, lifetime / 4)
        self._pause = min(_LOOK_INTERVAL, self._refresh)
        self._chunk = chunk
        self._failure: TusError | None = None
        self._info: FileInfo | None = None
        self._on_progress: OnProgress = lambda info: None
        self._hold = SURE
        self._start = self._reported = 0
        #: Which offset was told last.
        self._told: int | None = None
        #: How many bytes may come, and what is wrong with more; ``check`` says.
        self._room: int
        self._too_many: TusError
        #: How many bytes may come until more room must be promised, if that is so.
        self._granted: int | None = None
        self._told_at = self._looked_at = time.monotonic()
        self.reader = UploadReader(
            chunk.body,
            checksum=chunk.checksum,
            awaits_trailer=chunk.awaits_trailer,
            on_progress=self._progressed,
        )

    @property
    def error(self) -> TusError | None:
        """Why less was kept than was sent; ``None`` if all is well."""
        return self._failure or self.reader.error

    @property
    def is_fault(self) -> bool:
        """Whether ``error`` is the client's, so that coming back would not help."""
        return self.error is not None and not isinstance(self.error, _PASSING)

    @property
    def is_empty(self) -> bool:
        """Whether the request has no body."""
        return self._chunk.is_empty

    @property
    def length(self) -> int:
        """How many bytes are announced, 0 if nobody knows."""
        return self._chunk.body.length or 0

    @property
    def is_stopped(self) -> bool:
        """Whether the upload is to end with this request."""
        return isinstance(self.error, UploadStopped)

    def stop(self, answer: HookResponse) -> bool:
        """End the body, and let the client have `answer`.

        :returns: whether there was still something to end.
        """
        stopped = UploadStopped(answer.status or 400, answer.body, answer.headers)
        self.reader.interrupt(stopped)
        return self.reader.error is stopped

    def check(self, info: FileInfo, offset: int) -> None:
        """Refuse a body that announces more bytes than may come, before any is read."""
        size = self._settings.max_size if info.size is None else info.size
        room = size - offset
        largest = self._settings.max_body_size
        too_many: TusError = MaxSizeExceeded() if info.size is None else UploadSizeExceeded()
        if largest is not None and largest < room:
            room = largest
            too_many = BodyTooLarge()
        if self.length > room:
            raise too_many
        self._room = room
        self._too_many = too_many
        self.reader.limit(room, too_many)

    def receive_first(
        self, info: FileInfo, place: OpenPlace, request: RequestInfo
    ) -> tuple[FileInfo, Sequence[Event]]:
        """Append the chunk that comes with a creation, and complete the upload if it is all.

        Nobody knows the upload yet, so no lock is held and nothing is saved: the record is
        written once, by the caller, and tells how it ended.

        :returns: what is to be written.
        :raises TusError: if the chunk was wrong.
        """
        kept = self._append(info, 0, place)
        if self.is_fault and self.error is not None:
            raise self.error
        if kept > 0:
            info = self._touched(info, offset=kept)
        if kept == info.size:
            return self._finisher.complete(info, request, SURE)
        return info, ()

    def receive(
        self,
        info: FileInfo,
        offset: int,
        request: RequestInfo,
        on_progress: OnProgress,
        hold: Hold,
    ) -> FileInfo:
        """Append the chunk, then finish the upload or save how far it came.

        The caller holds the lock, has read `offset` under it and looks at ``error``
        afterwards: what arrived before an error is kept.

        :param on_progress: called now and then while bytes arrive, and at the end of a
            chunk that does not complete the upload.
        :raises LockLost: if the lock was lost meanwhile. What was kept counts if it did before
            the lock was another one's.
        """
        self.check(info, offset)
        self._info = info
        self._start = offset
        self._on_progress = on_progress
        self._hold = hold
        self._pace(self._told_at)
        infos = self._finisher.infos
        if infos.is_forgetful and time.time() - _written_at(info) > self._refresh:
            # Its first bytes may be long in coming.
            self._info = info = infos.save(info)
        if info.size is None and self._finisher.data.bounded:
            self._info = self._promised(info)
        kept = self._append(self._info, offset)
        hold.check()
        was_reserved = self._info.reserved > 0
        info = self._info.replace(offset=kept, reserved=0)
        if kept > offset:
            info = self._touched(info)
        if self.is_stopped:
            return info
        if kept == info.size and not self.is_fault:
            return self._finisher.finish(info, request, hold)
        if kept > offset or was_reserved:
            info = self._finisher.infos.save(info)
        if (kept > offset or self.error is None) and kept != self._told:
            on_progress(info)
        return info

    def receive_nothing(self, info: FileInfo, offset: int) -> None:
        """Check the PATCH of a finished upload: its end may be asked for again and again."""
        if offset != info.offset:
            raise OffsetMismatch(info.offset)
        self.check(info, offset)
        if not self._chunk.is_empty:
            self.reader.read(1)
        if self.error is not None:
            raise self.error

    def _append(self, info: FileInfo, offset: int, place: OpenPlace | None = None) -> int:
        if self._chunk.is_empty and not self.reader.provisional:
            return offset
        data = self._finisher.data
        try:
            if place is not None:
                return place.append(self.reader)
            return data.append(info, offset, self.reader, self._hold)
        except (StorageFull, Unavailable) as failure:
            self._failure = failure
            self._hold.check()
            return data.offset(info)
        finally:
            if bytes_received.receivers:
                self._report_bytes()
            if isinstance(self.reader.error, UploadInterrupted) and upload_taken_over.receivers:
                report(upload_taken_over, self._finisher.sender)

    def _promised(self, info: FileInfo) -> FileInfo:
        """Have room promised for the bytes that come next, and let no more come.

        A body whose length nobody knows is promised some room at a time, in the end what is
        left; what does not fit is not kept.

        :raises LimitReached: if there is no room for a body of a known length.
        """
        length = self._chunk.body.length
        full = None
        wanted = self.reader.received + _GRANT if length is None else length
        end = self._start + min(wanted, self._room)
        while end > info.promised:
            try:
                info = self._finisher.room.save(info, reserved=end)
            except LimitReached as error:
                if length is not None:
                    raise
                full = error
                end = error.left
        granted = max(0, info.promised - self._start)
        if full is not None:
            self.reader.limit(granted, full)
        elif length is None and granted < self._room:
            self.reader.limit(granted, self._too_many)
            self._granted = granted
            return info
        else:
            self.reader.limit(self._room, self._too_many)
        self._granted = None
        return info

    def _touched(self, info: FileInfo, **changes: Any) -> FileInfo:
        now = time.time()
        return info.replace(last_byte_at=now, expires_at=self._settings.expiry(now), **changes)

    def _progressed(self) -> None:
        """Tell how far it has come, and let it not expire meanwhile."""
        now = self.reader.last_progress
        received = self.reader.received
        granted = self._granted
        if granted is not None and self._info is not None and granted - _MARGIN < received:
            self._info = self._promised(self._info)
        is_due = self._info is not None and now - self._told_at >= self._interval
        if now - self._looked_at < self._pause and not is_due:
            return
        self._looked_at = now
        if bytes_received.receivers:
            self._report_bytes()
        if self._info is None:
            return
        info = self._info.replace(offset=self._start + received)
        if self._is_ageing(info):
            self._hold.check()
            try:
                info = self._info = self._finisher.infos.save(self._touched(info))
            except InfoConflict:
                raise  # others write it: the lock is lost
            except Unavailable:
                pass  # the bytes still come; it is tried again in a moment
        if is_due:
            self._told_at = now
            self._told = info.offset
            self._pace(now)
            self._on_progress(info)

    def _pace(self, told_at: float) -> None:
        """Have what arrives of a slow body told in time, if anybody wants that."""
        interval = self._finisher.pace
        self.reader.pace(told_at + interval, interval)

    def _report_bytes(self) -> None:
        size = self.reader.received - self._reported
        if size:
            self._reported += size
            report(bytes_received, self._finisher.sender, size=size)

    def _is_ageing(self, info: FileInfo) -> bool:
        """Whether it must be written that bytes arrive: an operator wants to know which uploads
        do not stand still, a quarter of the time to its expiry has passed, or the info store
        would soon forget it.
        """
        if time.time() - _written_at(info) > self._refresh:
            return True
        expiration = self._settings.expiration
        if info.expires_at is None or expiration is None:
            return False
        return time.time() > info.expires_at - expiration * 0.75


def _written_at(info: FileInfo) -> float:
    """Return when a record was written, or a time before that."""
    return info.last_byte_at or info.created_at
