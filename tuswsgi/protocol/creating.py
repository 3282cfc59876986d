"""Creates uploads, in one of two orders.

Bytes first: no other request can know a random id before its POST is answered. The bytes are
stored without a lock, and one record says how the POST ended.

Record first: if a hook chose the id or the path, a repeated POST gets the same one and has to
find what the first POST has left. If there is a quota, the record must promise the bytes before
they arrive. The upload is locked meanwhile.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tuswsgi.core.errors import HookBroken, StorageFull, UploadExists, UploadGone, UploadNotFound
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, State, Storage
from tuswsgi.lockers.base import HELD, Hold
from tuswsgi.observing.signals import tell, upload_created
from tuswsgi.outbox.post_create import PostCreate, deliver_held
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.finishing import Finisher
from tuswsgi.protocol.quota import Limit, Quota
from tuswsgi.protocol.receiving import Reception, take_over
from tuswsgi.transfer.reader import UploadReader

log = logging.getLogger(__name__)

#: The states of uploads that can be resumed.
_UNFINISHED = (State.RECEIVING, State.WAITING)


@dataclass(frozen=True)
class Creation:
    """What a POST asks for.

    :param size: ``None`` if the length is deferred or that of a final upload.
    :param concat: ``Upload-Concat`` as it was sent.
    :param parts: the ids of a final upload's parts, empty for any other upload.
    """

    size: int | None
    metadata: Metadata
    concat: str | None = None
    parts: tuple[str, ...] = ()


class Post(NamedTuple):
    """The request that creates an upload.

    :param limit: how many bytes it may bring.
    """

    reader: UploadReader
    limit: Limit
    request: RequestInfo


@dataclass(frozen=True)
class Creator:
    """Creates the files and records of new uploads."""

    context: Context
    quota: Quota
    finisher: Finisher

    def create(self, info: FileInfo, post: Post, *, is_chosen: bool) -> FileInfo:
        """Create an upload with the bytes that its POST brings.

        :param is_chosen: a hook chose the id or the path.
        :raises UploadExists: if a chosen id or path is another upload's.
        :raises StorageFull: if there is not enough space, or the quota is used up.
        """
        self.context.check_free_space(info)
        if is_chosen:
            return self._record_first(info, post, is_chosen=True)
        if not self.quota.is_limited:
            return self._bytes_first(info, post)
        try:
            return self._record_first(info, post, is_chosen=False)
        except Exception:
            self._remove_unknown(info.id, post.request)
            raise

    def _bytes_first(self, info: FileInfo, post: Post) -> FileInfo:
        """Store the bytes, then write the record, or delete the bytes if the POST fails.

        If the process dies in between, it leaves bytes without a record to the clean-up, but never
        a record without bytes.
        """
        context = self.context
        hooks = context.hooks
        upload = context.data.create_open(info)
        empty = info = info.replace(storage=upload.storage)
        events: Sequence[Event] = ()
        try:
            try:
                if not info.is_final:
                    reception = Reception(context, self.quota, info, 0, post.reader, post.limit)
                    info = reception.receive_first(upload)
            finally:
                upload.close()
            if info.offset == info.size and not info.is_final:
                info, events = self.finisher.prepare(info, post.request, HELD)
            # tusd reports a creation before its bytes arrive, rustus afterwards.
            created = empty if hooks.follows_tusd else info
            if self._is_reported(info):
                events = [
                    *context.outbox.events_for(HookType.POST_CREATE, created, post.request),
                    *events,
                ]
        except Exception:
            # Without a record no client can know of the upload.
            context.data.delete(info)
            raise
        self._write_record(info, events, HELD)
        if self._is_reported(info):
            context.outbox.tell(HookType.POST_CREATE, created, post.request)
        tell(upload_created, context.sender, info)
        self.finisher.announce(info, post.request)
        return info

    def _record_first(self, info: FileInfo, post: Post, *, is_chosen: bool) -> FileInfo:
        """Write the record, then store the bytes; or return the upload of an earlier POST.

        That is one with the same id or path, length, metadata and owner, which is unfinished: the
        answer to its POST was lost. It gets no bytes of this POST. A random id has none.
        """
        context = self.context
        known = context.find(info.id) if is_chosen else None
        if known is not None:
            # Before its holder is interrupted: the id may come from the client.
            self._check_same(info, known, post.request)
        with context.locker.lock(info.id, post.reader.interrupt) as hold:
            existing = context.find(info.id) if is_chosen else None
            if existing is None:
                info = self._with_storage(info, post)
                post_create = self._post_create(info, post)
                events = () if post_create is None else post_create.events
                if is_chosen:
                    info, existing = self._create_or_find(info, events, hold)
                else:
                    info = info.replace(storage=context.data.create(info))
                    self._write_record(info, events, hold)
            if existing is None:
                # A holder that lost the lock before stores no bytes without a record.
                hold.confirm_fenced()
                return self._receive(info, post, post_create, hold)
            if existing.id == info.id:
                if known is None:
                    self._check_same(info, existing, post.request)
                return self._resume(info, existing.id, post.request, hold)
        self._check_same(info, existing, post.request)
        with context.locker.lock(existing.id, post.reader.interrupt) as hold:
            return self._resume(info, existing.id, post.request, hold)

    def _with_storage(self, info: FileInfo, post: Post) -> FileInfo:
        """Return the upload as its record is to be: with a path, and with the bytes that its POST
        announces reserved if it has no length.
        """
        try:
            storage = self.context.data.storage_for(info)
        except UploadNotFound:
            log.error("pre-create chose the path %r, which is not allowed", info.storage.path)
            raise HookBroken from None
        if self.quota.is_limited and info.size is None:
            return info.replace(storage=storage, reserved=post.reader.length or 0)
        return info.replace(storage=storage)

    def _create_or_find(
        self, info: FileInfo, events: Sequence[Event], hold: Hold
    ) -> tuple[FileInfo, FileInfo | None]:
        """Create the file and the record of an upload.

        :returns: the upload, and the one that has its id or path already, if any.
        :raises UploadExists: if there is one that cannot be resumed.
        """
        is_new = True
        with self.context.locker.lock(_lock_of_path(info.storage)):
            try:
                info = info.replace(storage=self.context.data.create(info))
            except UploadExists:
                owner = self._owner_of_file(info)
                if owner is not None:
                    return info, owner
                is_new = False
            try:
                self._write_record(info, events, hold, delete_if_full=is_new)
            except UploadExists:
                # The record of an earlier POST was written after this one had looked for it. The
                # file may be that upload's, and stays.
                existing = self.context.find(info.id)
                if existing is None:
                    raise
                return info, existing
        return info, None

    def _owner_of_file(self, info: FileInfo) -> FileInfo | None:
        """Return the upload whose file is in the way; ``None`` if a process died after it had
        created the empty file. None can be about to write the record, since the path is locked.

        All records are read: slow, but paths hardly ever collide.

        :raises UploadExists: if the file has bytes but no record, or its upload was removed so
            that the file is about to be.
        """
        try:
            is_empty = self.context.data.offset(info) == 0
        except (OSError, UploadGone):
            raise UploadExists from None
        # In the order of an upload's life, so that none is missed while its state changes.
        states = State if is_empty else _UNFINISHED
        owners = [
            found
            for state in states
            for found in self.context.infos.scan(state)
            if found.storage.path == info.storage.path
        ]
        for owner in owners:
            if not owner.is_gone:
                return owner
        if owners or not is_empty:
            raise UploadExists
        return None

    def _write_record(
        self, info: FileInfo, events: Sequence[Event], hold: Hold, *, delete_if_full: bool = True
    ) -> None:
        """Write the record of an upload whose file exists.

        After ``StorageFull`` there is no record for sure, and the file is deleted. After any
        other error there may be one that a client was told of, so the file stays; if it is not
        needed, the clean-up removes it.

        :param delete_if_full: this request has created the file.
        """
        try:
            self.quota.create(info, events)
        except StorageFull:
            if delete_if_full:
                hold.check()
                self.context.data.delete(info)
            raise

    def _remove_unknown(self, id: str, request: RequestInfo) -> None:
        """Remove an upload whose POST failed: its client does not know the id, and its bytes would
        count in the quota.
        """
        try:
            with self.context.locker.try_lock(id) as hold:
                info = self.context.find(id)
                if info is not None and not info.is_gone and not info.is_finished:
                    self.context.remove(info, State.TERMINATED, request, hold)
        except Exception:
            log.exception("The upload %s failed, but still counts in the quota", id)

    def _post_create(self, info: FileInfo, post: Post) -> PostCreate | None:
        """Return the post-create of an upload, held back if its POST may complete the upload."""
        if info.is_final:
            return None
        hooks = self.context.hooks
        silence = None
        if not hooks.follows_tusd and (info.size == 0 or not post.reader.is_empty):
            silence = self.context.settings.network_timeout + hooks.progress_interval
        return PostCreate(self.context.outbox, info, post.request, silence)

    def _receive(
        self, info: FileInfo, post: Post, post_create: PostCreate | None, hold: Hold
    ) -> FileInfo:
        """Append the bytes of a POST to an upload whose record is written."""
        context = self.context
        tell(upload_created, context.sender, info)
        if post_create is None:
            return info
        post_create.begin(info)
        reception = Reception(
            context, self.quota, info, 0, post.reader, post.limit, hold, post_create.prolong
        )
        try:
            info = reception.receive()
            if reception.completes(info):
                info = self.finisher.finish(info, post.request, hold)
        finally:
            post_create.end(info, is_reported=self._is_reported(info))
        if reception.fault is not None and not info.is_finished:
            raise reception.fault
        return info

    def _is_reported(self, info: FileInfo) -> bool:
        """Return whether there is a post-create at the end of a POST.

        "After creating final upload with concatenation extension, you won't receive
        post-create hook", and neither "if you uploaded a whole file within one request"
        (rustus). tusd sends the latter.
        """
        return not info.is_final and (self.context.hooks.follows_tusd or not info.is_finished)

    def _check_same(self, info: FileInfo, existing: FileInfo, request: RequestInfo) -> None:
        """Check that a POST asks for an upload that exists and that it may use it.

        :raises UploadExists: if it asks for another one.
        :raises HookRefusal: if pre-access refuses.
        """
        if not _is_same(info, existing):
            raise UploadExists
        self.context.hooks.ask(HookType.PRE_ACCESS, existing, request)

    def _resume(self, info: FileInfo, id: str, request: RequestInfo, hold: Hold) -> FileInfo:
        """Return the upload of an earlier POST whose answer was lost.

        :raises UploadExists: if it is not the one that `info` asks for.
        """
        existing = take_over(self.context, self.context.infos.load(id), hold)
        if not _is_same(info, existing):
            raise UploadExists
        deliver_held(self.context.outbox, id)
        if existing.state is State.WAITING:
            return existing
        return self.finisher.finish_if_complete(existing, request, hold)


def _is_same(info: FileInfo, existing: FileInfo) -> bool:
    """Return whether a POST asks for an upload that exists and is unfinished."""
    return (
        not (existing.is_gone or existing.is_finished or existing.has_expired(time.time()))
        and (info.size, info.metadata, info.owner)
        == (existing.size, existing.metadata, existing.owner)
        and (info.is_partial, info.partial_uploads)
        == (existing.is_partial, existing.partial_uploads)
    )


def _lock_of_path(storage: Storage) -> str:
    """Return the name of the lock of a path; no upload has such an id."""
    return "tuswsgi-path-" + hashlib.sha256((storage.path or "").encode()).hexdigest()[:32]
