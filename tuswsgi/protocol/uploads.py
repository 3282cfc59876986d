"""The heart of the server: what tus requests do to uploads.

It decides and writes through the four interfaces and knows no HTTP: it is given typed
values and a body, and returns the upload's info or raises a ``TusError``. Each method is
one kind of request.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from tuswsgi.core.errors import (
    ExtensionDisabled,
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
)
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import FileInfo, State, Storage, check_id, new_id
from tuswsgi.datastores.base import DataStore, Readable
from tuswsgi.hooks.answers import check_answer
from tuswsgi.hooks.base import HookRequest, HookResponse
from tuswsgi.hooks.manager import HookManager
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Locker
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.protocol.creating import Creation, Creator
from tuswsgi.protocol.finishing import Finisher, sum_of_sizes
from tuswsgi.protocol.reception import Chunk, Reception
from tuswsgi.protocol.settings import UploadSettings
from tuswsgi.transfer.reader import ActiveReaders

log = logging.getLogger(__name__)

_AT_ONCE = nullcontext()


class Uploads:
    """The uploads of one server.

    :param data: where bytes are kept.
    :param infos: where records are kept.
    :param locker: who writes an upload, among all processes.
    :param hooks: the application's blocking hooks.
    :param outbox: its post-hooks.
    :param sender: who sends signals.
    """

    def __init__(
        self,
        data: DataStore,
        infos: InfoStore,
        locker: Locker[Any],
        hooks: HookManager,
        outbox: Outbox,
        settings: UploadSettings,
        sender: object = None,
    ) -> None:
        self.data = data
        self.infos = infos
        self.locker = locker
        self.hooks = hooks
        self.settings = settings
        self.extensions = settings.offered(data.extensions)
        self.finisher = Finisher(data, infos, locker, hooks, outbox, settings, sender)
        self.readers = ActiveReaders(
            settings.network_timeout, infos.lifetime, lambda: self.finisher.pace
        )
        self.creator = Creator(self.finisher)
        #: The PATCHes that this process receives, by the ids of their uploads.
        self._received: dict[str, tuple[Reception, RequestInfo]] = {}
        # A copy of it is made in a fraction of the time that a new one takes. As in rustus
        # pre-create is told of the store, which knows no place yet.
        self._blank = FileInfo(id="", storage=Storage(data.type))

    def create(
        self, creation: Creation, chunk: Chunk, request: RequestInfo
    ) -> tuple[FileInfo, HookResponse | None]:
        """Create an upload, with the first bytes if the request brings some.

        A chunk that breaks off does not undo the creation: the answer carries the offset
        that was reached, and the client goes on from there.

        :returns: the upload and what the pre-create hook wants the client to be told.
        """
        info = self._new_info(creation, request)
        if info.is_final:
            info = self._new_final(info, chunk, request)
        reception = self._reception(chunk)
        with self._receiving(reception):
            reception.check(info, 0)
            answer = self.hooks.ask(HookType.PRE_CREATE, info, request)
            change = None if answer is None else answer.change
            if change is not None:
                info = change.applied_to(info)
            if change is not None and (change.id or change.path):
                info = self.creator.create_chosen(info, reception, request)
            elif self.data.bounded:
                info = self.creator.create_promised(info, reception, request)
            else:
                info = self.creator.create(info, reception, request)
        if info.is_final:
            info = self._first_build(info, request)
        self._follow_up(info, request)
        return self._not_refused(info), answer

    def _new_info(self, creation: Creation, request: RequestInfo) -> FileInfo:
        size = creation.size
        now = time.time()
        if size is not None:
            self._check_promise(size)
        return self._blank.replace(
            id=new_id(),
            size=size,
            metadata=creation.metadata,
            is_partial=creation.concat == "partial",
            is_final=bool(creation.parts),
            concat=creation.concat,
            partial_uploads=creation.parts,
            owner=request.owner,
            state=State.WAITING if creation.parts else State.RECEIVING,
            created_at=now,
            expires_at=self.settings.expiry(now),
        )

    def _new_final(self, info: FileInfo, chunk: Chunk, request: RequestInfo) -> FileInfo:
        if not chunk.is_empty:
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
        if sum(part.promised for part in whole) > self.settings.max_size:
            raise MaxSizeExceeded
        return info.replace(size=sum_of_sizes(whole))

    def _load_part(self, id: str, request: RequestInfo) -> FileInfo:
        try:
            # Whoever has a part in an upload of his own can read it there.
            return self._access(id, request)
        except UploadNotFound:
            raise UploadNotFound(
                "The Upload-Concat header names an upload that does not exist."
            ) from None
        except UploadGone:
            raise UploadGone("The Upload-Concat header names an upload that was removed.") from None

    def _first_build(self, info: FileInfo, request: RequestInfo) -> FileInfo:
        try:
            return self.finisher.build_final(info.id, request)
        except UploadLocked:
            # A part is in use by another build; the next HEAD goes on.
            return info

    def inspect(self, id: str, request: RequestInfo) -> FileInfo:
        """Return an upload with its offset; a holder of its lock is asked to let go.

        "The Server MUST always include the Upload-Offset header in the response for a
        HEAD request". Nobody is told an offset equal to the length before finishing
        worked.
        """
        info = self._inspect_free(check_id(id), request)
        if info is None:
            info = self._access(id, request)
            if info.state is not State.WAITING and not info.is_finished:
                with self.locker.lock(id) as hold:
                    info = self.finisher.secure(self._load(id, request), hold)
                    info = self.finisher.finish_if_complete(info, request, hold)
                self._follow_up(info, request)
        if info.state is State.WAITING:
            info = self.finisher.build_final(id, request)
        return self._not_refused(info)

    def _inspect_free(self, id: str, request: RequestInfo) -> FileInfo | None:
        """Return an upload that nobody holds, ``None`` if that is not so easy.

        Whether the request may see the upload is looked at before a holder is disturbed;
        where there is none, the record need not be read twice.
        """
        if self.hooks.wants(HookType.PRE_ACCESS):
            return None
        try:
            with self.locker.try_lock(id) as hold:
                found = self.finisher.secure(self._load(id, request), hold)
                if found.state is State.WAITING:
                    return found
                info = self.finisher.finish_if_complete(found, request, hold)
        except UploadLocked:
            return None
        if not found.is_finished:
            self._follow_up(info, request)
        return info

    def append(
        self, id: str, offset: int, size: int | None, chunk: Chunk, request: RequestInfo
    ) -> FileInfo:
        """Keep the bytes of a chunk at `offset`.

        :param offset: ``Upload-Offset``.
        :param size: ``Upload-Length``, which ends a deferral.
        """
        finished = self._finished(id, offset, size, request)
        reception = self._reception(chunk)
        with self._receiving(reception):
            if finished is None:
                return self._not_refused(self._append(id, offset, size, reception, request))
            reception.receive_nothing(finished, offset)
        return self._not_refused(finished)

    def _finished(
        self, id: str, offset: int, size: int | None, request: RequestInfo
    ) -> FileInfo | None:
        """Check what can be checked before the lock, and return the upload if it is finished.

        Otherwise its record is read again under the lock, and a slow body need not keep two.
        """
        info = self._access(id, request)
        if info.is_final:
            # "The Server MUST respond with the 403 Forbidden status to PATCH requests
            # against a final upload URL and MUST NOT modify the final or its partial
            # uploads." (Concatenation)
            raise FinalUploadUnmodifiable
        self._check_size(info, offset, size)
        return info if info.is_finished else None

    def _append(
        self, id: str, offset: int, size: int | None, reception: Reception, request: RequestInfo
    ) -> FileInfo:
        with self.locker.lock(id, reception.reader.interrupt) as hold:
            reception.reader.guard(hold)
            info = self.finisher.secure(self._load(id, request), hold)
            if info.is_finished:
                reception.receive_nothing(info, offset)
                return info
            kept = self.finisher.kept(info, hold)
            if kept != offset:
                # "If the offsets do not match, the Server MUST respond with the 409
                # Conflict status without modifying the upload resource."
                raise OffsetMismatch(kept)
            self._check_size(info, offset, size)
            if info.size is None and size is not None:
                # Before the first byte: a crash must not leave bytes beyond what is known.
                info = self.finisher.room.save(info, size=size, reserved=0)
            self._received[info.id] = (reception, request)
            try:
                tell_progress = partial(self.finisher.tell_progress, request=request)
                info = reception.receive(info, offset, request, tell_progress, hold)
            finally:
                del self._received[info.id]
            if reception.is_stopped:
                self.finisher.remove(info, State.TERMINATED, request, hold)
        if reception.error is not None and not info.is_finished:
            raise reception.error
        self._follow_up(info, request)
        return info

    def _check_size(self, info: FileInfo, offset: int, size: int | None) -> None:
        """Check an ``Upload-Length`` that comes with a PATCH.

        "Once set the length MUST NOT be changed." (Creation, POST)
        """
        if size is None:
            return
        if info.size is not None and size != info.size:
            raise InvalidUploadLength("The Upload-Length header differs from the upload's length.")
        if size < offset:
            raise InvalidUploadLength("The Upload-Length header is less than the offset.")
        self._check_promise(size)

    def _check_promise(self, size: int) -> None:
        """Refuse a length that no upload may have here."""
        if size > self.settings.max_size:
            raise MaxSizeExceeded
        if size == 0 and not self.settings.allow_empty:
            raise InvalidUploadLength("Uploads of length 0 are not allowed here.")

    def terminate(self, id: str, request: RequestInfo) -> HookResponse | None:
        """Remove an upload for good and leave a tombstone.

        :returns: what the pre-terminate hook wants the client to be told.
        """
        self._access(id, request)
        with self.locker.lock(id) as hold:
            info = self._load(id, request)
            answer = self.hooks.ask(HookType.PRE_TERMINATE, info, request)
            self.finisher.remove(info, State.TERMINATED, request, hold)
        return answer

    def stop(self, id: str) -> bool:
        """End an unfinished upload for good, also while another process receives it.

        Its request keeps what arrived until the lock is given over, is answered 423, and
        then finds the upload gone.

        :returns: whether there was something to end: finished uploads stay.
        """
        with self.locker.lock(check_id(id)) as hold:
            info = self.infos.load(id)
            if info.is_gone or info.is_finished:
                return False
            self.finisher.remove(info, State.TERMINATED, RequestInfo(), hold)
        return True

    def remove(self, id: str) -> FileInfo:
        """Remove an upload for good, as its operator: no hook is asked. A holder of its lock
        is asked to let go.

        :returns: the tombstone.
        :raises UploadGone: if it was removed before.
        """
        with self.locker.lock(check_id(id)) as hold:
            info = self.infos.load(id)
            if info.is_gone:
                raise UploadGone
            return self.finisher.remove(info, State.TERMINATED, RequestInfo(), hold)

    def answered(self, hook: HookRequest, answer: HookResponse) -> None:
        """Obey the answer to a post-hook: that to post-receive can stop the upload.

        It does so only while the PATCH that was told of is still being received; it is
        terminated then, and the client gets the answer.
        """
        if not answer.stop:
            return
        reception, request = self._received.get(hook.info.id, (None, None))
        # The answer to one PATCH must not stop the next one.
        if (
            reception is None
            or request is not hook.request
            or not reception.stop(check_answer(answer))
        ):
            log.warning("%s of %s: it is too late to stop the upload", hook.type, hook.info.id)
        else:
            log.info("%s of %s: the upload is stopped", hook.type, hook.info.id)

    def look(self, id: str, request: RequestInfo) -> FileInfo:
        """Return an upload that may be downloaded. Takes no lock.

        :raises UploadNotFound: for an unfinished one, unless `download_unfinished` is set.
        """
        info = self._not_refused(self._access(id, request))
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
            now = self._moved(info)
            return now if now.is_finished else now.replace(offset=self.data.offset(now))

    def open(self, info: FileInfo, start: int) -> Readable:
        """Open the bytes of an upload that ``look`` returned."""
        try:
            return self.data.open(info, start)
        except UploadGone:
            return self.data.open(self._moved(info), start)

    def _moved(self, info: FileInfo) -> FileInfo:
        """Return an upload whose bytes are not where they were: it may have been joined to one
        file a moment ago.

        :raises UploadGone: if they are nowhere else.
        """
        now = self.infos.load(info.id)
        if now.is_gone or now.storage == info.storage:
            raise UploadGone
        return now

    def _access(self, id: str, request: RequestInfo) -> FileInfo:
        info = self._load(id, request)
        self.hooks.ask(HookType.PRE_ACCESS, info, request)
        return info

    def _load(self, id: str, request: RequestInfo) -> FileInfo:
        info = self.infos.load(check_id(id))
        if info.owner is not None and info.owner != request.owner:
            # Whose upload it is is nobody else's business, and neither that it is there.
            raise UploadNotFound
        if info.is_gone or self.has_expired(info):
            # "The latter one [410] SHOULD be used if the Server is keeping track of
            # expired uploads." (Expiration)
            raise UploadGone
        return info

    def has_expired(self, info: FileInfo) -> bool:
        """Return whether the time of an unfinished upload is over.

        :raises UploadGone: if it is a final upload of which a part is gone.
        """
        now = time.time()
        if not info.has_expired(now):
            return False
        if info.state is State.WAITING:
            # Bytes that arrive at its parts are bytes of the final upload.
            return not any(
                not part.is_finished and not part.has_expired(now)
                for part in self.finisher.parts_of(info)
            )
        return not (info.is_partial and self.infos.finals_waiting_for(info.id))

    def _not_refused(self, info: FileInfo) -> FileInfo:
        if info.state is State.REFUSED and info.response is not None:
            raise HookRefusal(
                info.response.status or 400, info.response.body, info.response.headers
            )
        return info

    def _follow_up(self, info: FileInfo, request: RequestInfo) -> None:
        """Do what follows from a finished part; the caller has given the lock back."""
        if info.is_partial and info.state is State.FINISHED:
            self.finisher.part_finished(info, request)

    def _reception(self, chunk: Chunk) -> Reception:
        if chunk.awaits_trailer and Extension.CHECKSUM_TRAILER not in self.extensions:
            raise ExtensionDisabled("Checksums in trailers are not offered here.")
        return Reception(self.finisher, chunk)

    def _receiving(self, reception: Reception) -> AbstractContextManager[None]:
        # With nothing to wait for, a server that stops need not refuse it.
        return _AT_ONCE if reception.is_empty else self.readers.active(reception.reader)
