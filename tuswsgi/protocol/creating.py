"""How a new upload gets a place for its bytes and a record.

Usually nobody can know of the upload before its POST is answered: bytes first, then one
record that tells how it ended. Where a hook chose the id or the path, a POST that comes
again chooses the same, and must find what the first one left; and where the room is bounded,
it must be promised before it is taken. There the record comes before the bytes, and everything
happens under the upload's lock.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tuswsgi.core.errors import HookBroken, StorageFull, UploadExists, UploadGone, UploadNotFound
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, State, Storage
from tuswsgi.lockers.base import SURE, Hold
from tuswsgi.observing.signals import tell, upload_created
from tuswsgi.outbox.held import HeldPostCreate
from tuswsgi.protocol.finishing import Finisher
from tuswsgi.protocol.reception import Reception

log = logging.getLogger(__name__)

_UNFINISHED = (State.RECEIVING, State.WAITING)

#: ``InfoStore.create``, or what promises room besides.
_Create = Callable[[FileInfo, Sequence[Event]], None]


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


@dataclass(frozen=True)
class Creator:
    """Writes new uploads."""

    finisher: Finisher

    def create(self, info: FileInfo, reception: Reception, request: RequestInfo) -> FileInfo:
        """Write an upload with an id that nobody else has.

        Bytes come first: a crash in between leaves bytes that nobody knows of, to be
        cleaned up, and never a record of bytes that are not there.
        """
        self.finisher.check_space(info)
        data = self.finisher.data
        hooks = self.finisher.hooks
        outbox = self.finisher.outbox
        place = data.create_open(info)
        empty = info = info.replace(storage=place.storage)
        events: Sequence[Event] = ()
        try:
            try:
                if not info.is_final:
                    info, events = reception.receive_first(info, place, request)
            finally:
                place.close()
            # tusd tells of a creation before its bytes have come, rustus after that.
            created = empty if hooks.follows_tusd else info
            if self._is_told(info):
                events = [*outbox.record(HookType.POST_CREATE, created, request), *events]
        except Exception:
            # No record was written, so nobody can know of it.
            data.delete(info)
            raise
        self._write(self.finisher.infos.create, info, events, SURE)
        if self._is_told(info):
            outbox.tell(HookType.POST_CREATE, created, request)
        tell(upload_created, self.finisher.sender, info)
        self.finisher.tell_finished(info, request)
        return info

    def create_chosen(self, info: FileInfo, reception: Reception, request: RequestInfo) -> FileInfo:
        """Write an upload whose id or path a hook chose, or go on with the one that is there.

        That is so where an unfinished upload is the same in length, metadata and owner:
        the answer to its POST was lost. It is given no bytes of this request.

        :raises UploadExists: if the id or the path is another upload's.
        """
        self.finisher.check_space(info)
        locker = self.finisher.locker
        let_go = reception.reader.interrupt
        known = self._record_of(info.id)
        if known is not None:
            self._check_access(info, known, request)
        with locker.lock(info.id, let_go) as hold:
            reception.reader.guard(hold)
            twin = self._record_of(info.id)
            if twin is None:
                info = self._promising(info.replace(storage=self._place(info)), reception)
                held = self._hold(info, reception, request)
                with locker.lock(_lock_of(info.storage)):
                    info, twin, is_new = self._take(info)
                    if twin is None:
                        twin = self._write_or_find(info, held.events, hold, is_new=is_new)
            if twin is None:
                # Who may have had the lock before writes no byte without the record.
                hold.settle()
                return self._receive(info, reception, request, held, hold)
            if twin.id == info.id:
                if known is None:
                    self._check_access(info, twin, request)
                return self._go_on(info, twin.id, request, hold)
        self._check_access(info, twin, request)
        with locker.lock(twin.id, let_go) as hold:
            return self._go_on(info, twin.id, request, hold)

    def create_promised(
        self, info: FileInfo, reception: Reception, request: RequestInfo
    ) -> FileInfo:
        """Write an upload with an id that nobody else has, once room is promised to it.

        If the request fails, the upload is removed again: nobody was told where it is, and
        the room would stay promised.

        :raises LimitReached: if there is no room.
        """
        self.finisher.check_space(info)
        with self.finisher.locker.lock(info.id, reception.reader.interrupt) as hold:
            reception.reader.guard(hold)
            info = info.replace(storage=self.finisher.data.create(info))
            info = self._promising(info, reception)
            held = self._hold(info, reception, request)
            try:
                self._write(self.finisher.room.create, info, held.events, hold)
                return self._receive(info, reception, request, held, hold)
            except Exception:
                self._remove(info.id, request, hold)
                raise

    def _remove(self, id: str, request: RequestInfo, hold: Hold) -> None:
        try:
            # What failed may have been written all the same.
            info = self._record_of(id)
            if info is not None and not info.is_gone and not info.is_finished:
                self.finisher.remove(info, State.TERMINATED, request, hold)
        except Exception:
            log.exception("The upload %s, of which nobody was told, may keep its room", id)

    def _promising(self, info: FileInfo, reception: Reception) -> FileInfo:
        """Return an upload that promises what its request brings, if it promises no length."""
        if self.finisher.data.bounded and info.size is None:
            return info.replace(reserved=reception.length)
        return info

    def _is_told(self, info: FileInfo) -> bool:
        """Whether there is a post-create for an upload, at the end of its POST.

        "After creating final upload with concatenation extension, you won't receive
        post-create hook", and neither "if you uploaded a whole file within one request"
        (rustus). tusd tells of the latter.
        """
        return not info.is_final and (self.finisher.hooks.follows_tusd or not info.is_finished)

    def _check_access(self, info: FileInfo, twin: FileInfo, request: RequestInfo) -> None:
        """Refuse to go on with an upload before anybody who holds it is disturbed: which one it
        is may follow from what the client said.

        :raises UploadExists: if it is not the one that `info` is to be.
        :raises HookRefusal: if the request may not touch it.
        """
        if not _is_again(info, twin):
            raise UploadExists
        self.finisher.hooks.ask(HookType.PRE_ACCESS, twin, request)

    def _place(self, info: FileInfo) -> Storage:
        try:
            return self.finisher.data.place(info)
        except UploadNotFound:
            log.error("pre-create chose the path %r, where no upload may be", info.storage.path)
            raise HookBroken from None

    def _record_of(self, id: str) -> FileInfo | None:
        try:
            return self.finisher.infos.load(id)
        except UploadNotFound:
            return None

    def _take(self, info: FileInfo) -> tuple[FileInfo, FileInfo | None, bool]:
        """Make the place of `info` and return it, with the upload that has the place already,
        and whether the place is a new one.

        An empty place without a record is what a crash leaves between the two. Nobody else
        can be between them now: the place is locked. That of an upload that was removed is about
        to be removed, too.
        """
        data = self.finisher.data
        try:
            return info.replace(storage=data.create(info)), None, True
        except UploadExists:
            try:
                is_empty = data.offset(info) == 0
            except (OSError, UploadGone):
                raise UploadExists from None
            owner = self._owner_of(info.storage, None if is_empty else _UNFINISHED)
            if (owner is None and not is_empty) or (owner is not None and owner.is_gone):
                raise
            return info, owner, False

    def _owner_of(self, place: Storage, states: Collection[State] | None) -> FileInfo | None:
        """Look through all uploads in these states: it is slow, but collisions are rare.

        :returns: a tombstone if there is nothing else.
        """
        after = ""
        tombstone = None
        while page := self.finisher.infos.list(states, after=after):
            for info in page:
                if info.storage.path == place.path:
                    if not info.is_gone:
                        return info
                    tombstone = info
            after = page[-1].id
        return tombstone

    def _write(self, create: _Create, info: FileInfo, events: Sequence[Event], hold: Hold) -> None:
        """Write the record of an upload whose place this request has made.

        Where nobody knows whether there is a record now, the bytes stay: somebody may have
        been told of them. Those that nobody needs are the clean-up's.
        """
        try:
            create(info, events)
        except StorageFull:
            hold.check()
            self.finisher.data.delete(info)
            raise

    def _write_or_find(
        self, info: FileInfo, events: Sequence[Event], hold: Hold, *, is_new: bool
    ) -> FileInfo | None:
        """Write the record of an upload, or return the one that has its id by now.

        That is so where the info store wrote the record of an earlier POST after this one had
        looked for it. What lies in the place may then be that upload's, and stays.

        :param is_new: this request has made the place.
        """
        create: _Create = self.finisher.room.create
        try:
            if is_new:
                self._write(create, info, events, hold)
            else:
                create(info, events)
        except UploadExists:
            twin = self._record_of(info.id)
            if twin is None:
                raise
            return twin
        return None

    def _hold(self, info: FileInfo, reception: Reception, request: RequestInfo) -> HeldPostCreate:
        """Return the post-create of an upload, held back if this request may complete it."""
        hooks = self.finisher.hooks
        infos = self.finisher.infos
        if info.is_final:
            return HeldPostCreate(infos, (), 0.0)
        events = self.finisher.outbox.record(HookType.POST_CREATE, info, request)
        if hooks.follows_tusd or (reception.is_empty and info.size != 0):
            return HeldPostCreate(infos, events, 0.0)
        # The longest silence of a body, and of those who are told of its progress.
        silence = self.finisher.settings.network_timeout + hooks.progress_interval
        return HeldPostCreate(infos, events, silence)

    def _receive(
        self,
        info: FileInfo,
        reception: Reception,
        request: RequestInfo,
        held: HeldPostCreate,
        hold: Hold,
    ) -> FileInfo:
        outbox = self.finisher.outbox
        tell(upload_created, self.finisher.sender, info)
        if info.is_final:
            return info
        if not held.holds:
            outbox.tell(HookType.POST_CREATE, info, request)
        try:
            info = reception.receive(info, 0, request, held.prolong, hold)
        finally:
            if held.holds and self._is_told(info):
                held.free()
                outbox.tell(HookType.POST_CREATE, info, request)
            elif held.holds:
                held.drop()
                outbox.wake(info.id)
        if reception.is_fault and reception.error is not None and not info.is_finished:
            raise reception.error
        return info

    def _go_on(self, info: FileInfo, id: str, request: RequestInfo, hold: Hold) -> FileInfo:
        """Return an upload again whose POST was not answered. The caller holds its lock.

        :raises UploadExists: if it is not the one that `info` is to be.
        """
        infos = self.finisher.infos
        twin = self.finisher.secure(infos.load(id), hold)
        if not _is_again(info, twin):
            raise UploadExists
        now = time.time()
        for event in infos.events(id):
            if event.type is HookType.POST_CREATE and event.due_at > now:
                infos.put_back(replace(event, due_at=0.0))
        self.finisher.outbox.wake(id)
        if twin.state is State.WAITING:
            return twin
        return self.finisher.finish_if_complete(twin, request, hold)


def _is_again(info: FileInfo, twin: FileInfo) -> bool:
    """Whether a POST asks for the same upload as the one that is there, which is unfinished."""
    return (
        not (twin.is_gone or twin.is_finished or twin.has_expired(time.time()))
        and (info.size, info.metadata, info.owner) == (twin.size, twin.metadata, twin.owner)
        and (info.is_partial, info.partial_uploads) == (twin.is_partial, twin.partial_uploads)
    )


def _lock_of(place: Storage) -> str:
    """Name the lock of a place, which is none of an upload's names."""
    return "tuswsgi-place-" + hashlib.sha256((place.path or "").encode()).hexdigest()[:32]
