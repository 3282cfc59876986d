"""The heart of the server: what tus requests do to uploads.

Each public method is one kind of request. It gets typed values and a body, knows no HTTP, and
returns the upload's record or raises a ``TusError``.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from tuswsgi.core.errors import (
    FinalUploadUnmodifiable,
    HookRefusal,
    InvalidConcat,
    InvalidUploadLength,
    MaxSizeExceeded,
    OffsetMismatch,
    PartsUnfinished,
    UploadGone,
    UploadLocked,
    UploadNotFound,
    UploadStopped,
)
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import FileInfo, State, Storage, check_id, new_id
from tuswsgi.datastores.base import Readable
from tuswsgi.hooks.answers import check_answer
from tuswsgi.hooks.base import HookRequest, HookResponse
from tuswsgi.protocol.concatenation import Concatenation, sum_of_sizes
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.creating import Creation, Creator, Post
from tuswsgi.protocol.finishing import Finisher
from tuswsgi.protocol.quota import Quota, QuotaSettings
from tuswsgi.protocol.receiving import (
    Reception,
    limit_of,
    progress_interval,
    receive_nothing,
    stored_offset,
    take_over,
    tell_progress,
)
from tuswsgi.transfer.reader import ActiveReaders, UploadReader

log = logging.getLogger(__name__)

_AT_ONCE = nullcontext()


class Uploads:
    """The uploads of one server."""

    def __init__(self, context: Context, quota: QuotaSettings) -> None:
        self.context = context
        self.data = context.data
        self.infos = context.infos
        self.locker = context.locker
        self.hooks = context.hooks
        self.settings = context.settings
        self.extensions = context.extensions
        self.finisher = Finisher(context)
        self._quota = Quota(context, quota)
        self.concatenation = Concatenation(context, self._quota, self.finisher)
        self._creator = Creator(context, self._quota, self.finisher)
        self.readers = ActiveReaders(
            context.settings.network_timeout,
            context.infos.lifetime,
            partial(progress_interval, context),
        )
        #: The PATCHes that this process receives, by the ids of their uploads.
        self._patches: dict[str, tuple[UploadReader, RequestInfo]] = {}
        # To copy it takes a fraction of the time of a new one. As in rustus pre-create is told
        # of the data store; there is no path yet.
        self._blank = FileInfo(id="", storage=Storage(context.data.type))

    def create(
        self, creation: Creation, reader: UploadReader, request: RequestInfo
    ) -> tuple[FileInfo, HookResponse | None]:
        """Create an upload, with the first bytes if the request brings some.

        If the body breaks off, the upload is created nevertheless, and the client resumes it at
        the offset in the answer.

        :returns: the upload, and what the pre-create hook wants the client to be told.
        """
        info = self._new_info(creation, request)
        if info.is_final:
            info = self._with_parts(info, reader, request)
        with self._receiving(reader):
            limit = limit_of(self.context, info, 0, reader.length)
            answer = self.hooks.ask(HookType.PRE_CREATE, info, request)
            change = None if answer is None else answer.change
            if change is not None:
                info = change.applied_to(info)
            is_chosen = change is not None and bool(change.id or change.path)
            info = self._creator.create(info, Post(reader, limit, request), is_chosen=is_chosen)
        if info.is_final:
            info = self._build_now(info, request)
        self._follow_up(info, request)
        return _not_refused(info), answer

    def _new_info(self, creation: Creation, request: RequestInfo) -> FileInfo:
        now = time.time()
        expiration = self.context.expiration
        if creation.size is not None:
            self._check_size(creation.size)
        return self._blank.replace(
            id=new_id(),
            size=creation.size,
            metadata=creation.metadata,
            is_partial=creation.concat == "partial",
            is_final=bool(creation.parts),
            concat=creation.concat,
            partial_uploads=creation.parts,
            owner=request.owner,
            state=State.WAITING if creation.parts else State.RECEIVING,
            created_at=now,
            expires_at=None if expiration is None else now + expiration,
        )

    def _with_parts(self, info: FileInfo, reader: UploadReader, request: RequestInfo) -> FileInfo:
        """Check the parts of a final upload, and return it with its size."""
        if not reader.is_empty:
            # "The Server MUST respond with the 403 Forbidden status to PATCH requests
            # against a final upload URL"; bytes with its creation are no better.
            raise FinalUploadUnmodifiable
        parts = {id: self._load_part(id, request) for id in dict.fromkeys(info.partial_uploads)}
        for part in parts.values():
            if not part.is_partial:
                raise InvalidConcat("The Upload-Concat header names an upload that is not partial.")
            if part.state is State.REFUSED:
                raise InvalidConcat("The Upload-Concat header names an upload that was refused.")
        if Extension.CONCATENATION_UNFINISHED not in self.extensions and any(
            not part.is_finished for part in parts.values()
        ):
            raise PartsUnfinished
        whole = [parts[id] for id in info.partial_uploads]
        if sum(part.promised for part in whole) > self.context.max_file_size:
            raise MaxSizeExceeded
        return info.replace(size=sum_of_sizes(whole))

    def _load_part(self, id: str, request: RequestInfo) -> FileInfo:
        try:
            # The final upload makes its bytes readable, so the request must have access.
            return self._access(id, request)
        except UploadNotFound:
            raise UploadNotFound(
                "The Upload-Concat header names an upload that does not exist."
            ) from None
        except UploadGone:
            raise UploadGone("The Upload-Concat header names an upload that was removed.") from None

    def _build_now(self, info: FileInfo, request: RequestInfo) -> FileInfo:
        try:
            return self.concatenation.build(info.id, request)
        except UploadLocked:
            # Another build uses a part; the next HEAD tries again.
            return info

    def inspect(self, id: str, request: RequestInfo) -> FileInfo:
        """Return an upload with its offset; a request that holds its lock is interrupted.

        "The Server MUST always include the Upload-Offset header in the response for a HEAD
        request". An offset equal to the length is returned only once the upload is finished.
        """
        info = self._inspect_unlocked(check_id(id), request)
        if info is None:
            info = self._access(id, request)
            if info.state is not State.WAITING and not info.is_finished:
                with self.locker.lock(id) as hold:
                    info = take_over(self.context, self._load(id, request), hold)
                    info = self.finisher.finish_if_complete(info, request, hold)
                self._follow_up(info, request)
        if info.state is State.WAITING:
            info = self.concatenation.build(id, request)
        return _not_refused(info)

    def _inspect_unlocked(self, id: str, request: RequestInfo) -> FileInfo | None:
        """Return an upload whose lock is free; ``None`` if it is held.

        Access is checked before a holder is interrupted. Without a hook for that and without a
        holder, the record is read only once.
        """
        if self.hooks.wants(HookType.PRE_ACCESS):
            return None
        try:
            with self.locker.try_lock(id) as hold:
                found = take_over(self.context, self._load(id, request), hold)
                if found.state is State.WAITING:
                    return found
                info = self.finisher.finish_if_complete(found, request, hold)
        except UploadLocked:
            return None
        if not found.is_finished:
            self._follow_up(info, request)
        return info

    def append(
        self, id: str, offset: int, size: int | None, reader: UploadReader, request: RequestInfo
    ) -> FileInfo:
        """Append the bytes of a PATCH at `offset`.

        :param offset: ``Upload-Offset``.
        :param size: ``Upload-Length``, which ends a deferral.
        """
        finished = self._finished(id, offset, size, request)
        with self._receiving(reader):
            if finished is None:
                return _not_refused(self._append(id, offset, size, reader, request))
            receive_nothing(self.context, finished, offset, reader)
        return _not_refused(finished)

    def _finished(
        self, id: str, offset: int, size: int | None, request: RequestInfo
    ) -> FileInfo | None:
        """Check a PATCH as far as possible without the lock; return the upload if it is finished.

        The record of an unfinished one is read again under the lock; a slow body is not to keep
        two in memory.
        """
        info = self._access(id, request)
        if info.is_final:
            # "The Server MUST respond with the 403 Forbidden status to PATCH requests
            # against a final upload URL and MUST NOT modify the final or its partial
            # uploads." (Concatenation)
            raise FinalUploadUnmodifiable
        self._check_length(info, offset, size)
        return info if info.is_finished else None

    def _append(
        self, id: str, offset: int, size: int | None, reader: UploadReader, request: RequestInfo
    ) -> FileInfo:
        context = self.context
        with self.locker.lock(id, reader.interrupt) as hold:
            info = take_over(context, self._load(id, request), hold)
            if info.is_finished:
                receive_nothing(context, info, offset, reader)
                return info
            stored = stored_offset(context, info, hold)
            if stored != offset:
                # "If the offsets do not match, the Server MUST respond with the 409
                # Conflict status without modifying the upload resource."
                raise OffsetMismatch(stored)
            self._check_length(info, offset, size)
            if info.size is None and size is not None:
                # Before the first byte: bytes beyond the length must never be stored.
                info = self._quota.save(info, size=size, reserved=0)
            limit = limit_of(context, info, offset, reader.length)
            on_progress = partial(tell_progress, context, request)
            reception = Reception(
                context, self._quota, info, offset, reader, limit, hold, on_progress
            )
            self._patches[id] = (reader, request)
            try:
                info = reception.receive()
            finally:
                del self._patches[id]
            if reception.is_stopped:
                context.remove(info, State.TERMINATED, request, hold)
            elif reception.completes(info):
                info = self.finisher.finish(info, request, hold)
        if reception.error is not None and not info.is_finished:
            raise reception.error
        self._follow_up(info, request)
        return info

    def _check_length(self, info: FileInfo, offset: int, size: int | None) -> None:
        """Check the ``Upload-Length`` of a PATCH.

        "Once set the length MUST NOT be changed." (Creation, POST)
        """
        if size is None:
            return
        if info.size is not None and size != info.size:
            raise InvalidUploadLength("The Upload-Length header differs from the upload's length.")
        if size < offset:
            raise InvalidUploadLength("The Upload-Length header is less than the offset.")
        self._check_size(size)

    def _check_size(self, size: int) -> None:
        """Refuse a length that no upload may have here."""
        if size > self.context.max_file_size:
            raise MaxSizeExceeded
        if size == 0 and not self.settings.allow_empty:
            raise InvalidUploadLength("Uploads of length 0 are not allowed here.")

    def terminate(self, id: str, request: RequestInfo) -> HookResponse | None:
        """Remove an upload for its client; a request that holds its lock is interrupted.

        :returns: what the pre-terminate hook wants the client to be told.
        """
        self._access(id, request)
        with self.locker.lock(id) as hold:
            info = self._load(id, request)
            answer = self.hooks.ask(HookType.PRE_TERMINATE, info, request)
            self.context.remove(info, State.TERMINATED, request, hold)
        return answer

    def remove(self, id: str) -> FileInfo:
        """Remove an upload for the operator, without asking a hook; a request that holds its
        lock is interrupted.

        :returns: the tombstone.
        :raises UploadGone: if it was removed before.
        """
        with self.locker.lock(check_id(id)) as hold:
            info = self.infos.load(id)
            if info.is_gone:
                raise UploadGone
            return self.context.remove(info, State.TERMINATED, RequestInfo(), hold)

    def stop(self, id: str) -> bool:
        """Remove an unfinished upload for the application, also while a process receives it.

        The request that receives it stores what has arrived, is answered 423, and then the
        client finds the upload gone.

        :returns: whether the upload was unfinished.
        """
        with self.locker.lock(check_id(id)) as hold:
            info = self.infos.load(id)
            if info.is_gone or info.is_finished:
                return False
            self.context.remove(info, State.TERMINATED, RequestInfo(), hold)
        return True

    def answered(self, hook: HookRequest, answer: HookResponse) -> None:
        """Obey the answer to a post-hook: that to post-receive can stop an upload.

        The upload is removed if the PATCH that the hook reported is still being received, and
        its client gets the answer.
        """
        if not answer.stop:
            return
        reader, request = self._patches.get(hook.info.id, (None, None))
        # The answer to one PATCH must not stop the next one.
        if reader is not None and request is hook.request:
            answer = check_answer(answer)
            stopped = UploadStopped(answer.status or 400, answer.body, answer.headers)
            reader.interrupt(stopped)
            if reader.error is stopped:
                log.info("%s of %s: the upload is stopped", hook.type, hook.info.id)
                return
        log.warning("%s of %s: it is too late to stop the upload", hook.type, hook.info.id)

    def downloadable(self, id: str, request: RequestInfo) -> FileInfo:
        """Return an upload that may be downloaded. Takes no lock.

        :raises UploadNotFound: if it is unfinished and `download_unfinished` is off.
        """
        info = _not_refused(self._access(id, request))
        if not info.is_finished:
            if not self.settings.download_unfinished or info.state is State.WAITING:
                raise UploadNotFound("The upload is not finished.")
            info = self._with_offset(info)
        self.hooks.ask(HookType.PRE_GET, info, request)
        return info

    def _with_offset(self, info: FileInfo) -> FileInfo:
        try:
            return info.replace(offset=self.data.offset(info))
        except UploadGone:
            moved = self._moved(info)
            return moved if moved.is_finished else moved.replace(offset=self.data.offset(moved))

    def open(self, info: FileInfo, start: int) -> Readable:
        """Open the bytes of an upload that ``downloadable`` returned."""
        try:
            return self.data.open(info, start)
        except UploadGone:
            return self.data.open(self._moved(info), start)

    def _moved(self, info: FileInfo) -> FileInfo:
        """Return an upload whose file is gone with its new storage: its segments may have been
        joined a moment ago.

        :raises UploadGone: if its storage is the same.
        """
        moved = self.infos.load(info.id)
        if moved.is_gone or moved.storage == info.storage:
            raise UploadGone
        return moved

    def _access(self, id: str, request: RequestInfo) -> FileInfo:
        info = self._load(id, request)
        if self.hooks.hooks:
            self.hooks.ask(HookType.PRE_ACCESS, info, request)
        return info

    def _load(self, id: str, request: RequestInfo) -> FileInfo:
        info = self.infos.load(check_id(id))
        if info.owner is not None and info.owner != request.owner:
            # Other owners are not even told that it exists.
            raise UploadNotFound
        if info.is_gone or self.has_expired(info):
            # "The latter one [410] SHOULD be used if the Server is keeping track of
            # expired uploads." (Expiration)
            raise UploadGone
        return info

    def has_expired(self, info: FileInfo) -> bool:
        """Return whether an unfinished upload has expired.

        :raises UploadGone: if it is a final upload and a part of it is gone.
        """
        now = time.time()
        if not info.has_expired(now):
            return False
        if info.state is State.WAITING:
            # Bytes that arrive at a part keep the final upload alive.
            return not any(
                not part.is_finished and not part.has_expired(now)
                for part in self.concatenation.parts_of(info)
            )
        return not (info.is_partial and self.infos.finals_waiting_for(info.id))

    def _follow_up(self, info: FileInfo, request: RequestInfo) -> None:
        """Build the final uploads that waited for a finished part. The caller holds no lock."""
        if info.is_partial and info.state is State.FINISHED:
            self.concatenation.part_finished(info, request)

    def _receiving(self, reader: UploadReader) -> AbstractContextManager[None]:
        # A request without a body is short, so a server that stops need not refuse it.
        return _AT_ONCE if reader.is_empty else self.readers.active(reader)


def _not_refused(info: FileInfo) -> FileInfo:
    """Return an upload unless pre-finish refused it.

    :raises HookRefusal: with the response of the hook.
    """
    if info.state is State.REFUSED and info.response is not None:
        raise HookRefusal(info.response.status or 400, info.response.body, info.response.headers)
    return info
