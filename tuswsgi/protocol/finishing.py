"""What happens once the last byte is there: finishing an upload, building a final one.

The last byte makes the data complete, not the upload. Every step here may be cut off by
the death of the process and is then done again by whoever comes next: the completing
request, a HEAD, a PATCH at the end or the sweep.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tuswsgi.core.errors import (
    HookRefusal,
    MaxSizeExceeded,
    StorageFull,
    TusError,
    UploadGone,
    UploadNotFound,
)
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo, FinalResponse, State
from tuswsgi.datastores.base import DataStore
from tuswsgi.hooks.manager import HookManager
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Hold, Locker
from tuswsgi.observing.signals import tell, upload_finished, upload_progress, upload_terminated
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.protocol.quota import Room
from tuswsgi.protocol.settings import UploadSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finisher:
    """Finishes uploads and makes final uploads of their parts."""

    data: DataStore
    infos: InfoStore
    locker: Locker[Any]
    hooks: HookManager
    outbox: Outbox
    settings: UploadSettings
    #: Who sends signals.
    sender: object = None

    @property
    def room(self) -> Room:
        """Who promises room to uploads."""
        return Room(self.data, self.infos, self.locker, self.remove)

    def secure(self, info: FileInfo, hold: Hold) -> FileInfo:
        """Return an upload to which nothing happens any more but by who holds its lock now.

        Whoever gets the lock of an upload calls this first. If the holder before only lost
        it, that one may still write: what counts of its bytes is settled here.

        :param info: the upload as it was read under the lock.
        """
        if not hold.is_contested:
            return info
        if info.state is State.RECEIVING:
            info = self.infos.save(info.replace(storage=self.data.seal(info)))
            log.warning(
                "%s was taken over from a holder that may still write: it is sealed", info.id
            )
        hold.settle()
        return info

    def kept(self, info: FileInfo, hold: Hold) -> int:
        """Return how many bytes of an unfinished upload are kept. The caller holds its lock.

        :raises UploadGone: if they are not there any more, and nobody else can have finished the
            upload meanwhile.
        """
        try:
            return self.data.offset(info)
        except UploadGone:
            hold.check()
            raise

    def finish(self, info: FileInfo, request: RequestInfo, hold: Hold) -> FileInfo:
        """Finish an upload whose bytes are all kept. The caller holds its lock.

        :returns: the finished or the refused upload.
        :raises TusError: if it could not be finished now; it stays complete and the next
            one who asks tries again.
        """
        finished, events = self.complete(info, request, hold)
        hold.check()
        saved = self.infos.save(finished, events)
        if saved.storage is not info.storage:
            self.data.tidy(info)
        self.tell_finished(saved, request)
        return saved

    def tell_finished(self, info: FileInfo, request: RequestInfo) -> None:
        """Tell everybody, unless the upload was refused."""
        if info.state is State.FINISHED:
            self.outbox.tell(HookType.POST_FINISH, info, request)
            tell(upload_finished, self.sender, info)

    @property
    def pace(self) -> float:
        """At which interval progress is to be told, in seconds; infinite if nobody wants it."""
        if self.hooks.wants(HookType.POST_RECEIVE) or upload_progress.receivers:
            return self.hooks.progress_interval
        return math.inf

    def tell_progress(self, info: FileInfo, request: RequestInfo) -> None:
        """Tell everybody how far an upload has come."""
        self.outbox.tell(HookType.POST_RECEIVE, info, request)
        tell(upload_progress, self.sender, info)

    def remove(self, info: FileInfo, state: State, request: RequestInfo, hold: Hold) -> FileInfo:
        """Remove an upload for good and leave a tombstone. The caller holds its lock.

        The tombstone comes first: who has lost the lock cannot write it, and must not delete
        what others have been told of since. A crash in between leaves bytes to the clean-up.
        """
        events = self.outbox.record(HookType.POST_TERMINATE, info, request)
        bury = partial(self.infos.delete, info, events, state=state, now=time.time())
        hold.check()
        try:
            info = bury()
        except StorageFull:
            # Nothing can be written before something is removed.
            hold.check()
            self.data.delete(info)
            info = bury()
        try:
            hold.check()
            self.data.delete(info)
        except TusError as error:
            log.warning("The bytes of %s are left to the clean-up: %s", info.id, error)
        except Exception:
            log.exception("The bytes of %s could not be removed; the clean-up tries again", info.id)
        self.outbox.tell(HookType.POST_TERMINATE, info, request)
        tell(upload_terminated, self.sender, info)
        return info

    def complete(
        self, info: FileInfo, request: RequestInfo, hold: Hold
    ) -> tuple[FileInfo, Sequence[Event]]:
        """Do all of ``finish`` but save: return what is to be saved."""
        assert info.size is not None
        storage = self.data.finish(info, hold)
        if info.offset != info.size or storage is not info.storage:
            info = info.replace(offset=info.size, storage=storage)
        try:
            answer = self.hooks.ask(HookType.PRE_FINISH, info, request)
        except HookRefusal as refusal:
            if refusal.status >= 500:
                raise
            # A hook's 4xx is its last word: it is kept and repeated.
            response = FinalResponse(refusal.status, refusal.message, refusal.headers)
            return info.replace(state=State.REFUSED, finished_at=time.time(), response=response), ()
        if answer is not None:
            info = info.replace(
                response=FinalResponse(answer.status, answer.body or "", answer.headers)
            )
        info = info.replace(state=State.FINISHED, finished_at=time.time())
        return info, self.outbox.record(HookType.POST_FINISH, info, request)

    def finish_if_complete(self, info: FileInfo, request: RequestInfo, hold: Hold) -> FileInfo:
        """Return `info` with its real offset, finished if all bytes are there.

        The caller holds the lock.
        """
        if info.is_finished:
            return info
        offset = self.kept(info, hold)
        if offset == info.size:
            return self.finish(info, request, hold)
        return info.replace(offset=offset)

    def build_final(self, id: str, request: RequestInfo) -> FileInfo:
        """Make a waiting final upload of its parts, if they are all finished.

        Locks: the final one first, then the parts in the order of their ids, so that two
        of these never wait for each other.

        :returns: the final upload, still waiting if a part is unfinished.
        :raises UploadGone: if a part is not there any more, so that it never can be built,
            or if the upload itself was removed.
        :raises MaxSizeExceeded: if parts whose length was deferred turned out too large.
        """
        with self.locker.lock(id) as hold:
            info = self.secure(self.infos.load(id), hold)
            if info.is_gone:
                raise UploadGone
            if info.state is not State.WAITING:
                return info
            with self._locked_parts(info) as parts:
                size = sum_of_sizes(parts)
                if size is not None and size > self.settings.max_size:
                    raise MaxSizeExceeded
                if any(part.state is not State.FINISHED for part in parts):
                    return info.replace(size=size)
                if self.data.bounded and info.size != size:
                    info = self.room.save(info, size=size)
                info = info.replace(size=size)
                if self.data.offset(info) != size:
                    self.check_space(info)
                    self.data.concatenate(info, parts, hold)
                info = self.finish(info, request, hold)
        if self.settings.remove_parts and info.state is State.FINISHED:
            self._remove_parts(info, request)
        return info

    def check_space(self, info: FileInfo) -> None:
        """Refuse what would not fit beside what must stay free, before any of it is written.

        :raises StorageFull: while there is no room for it.
        """
        free = self.data.free_space()
        if free is not None and free - (info.size or 0) < self.settings.min_free_disk:
            raise StorageFull

    def part_finished(self, part: FileInfo, request: RequestInfo) -> None:
        """Build the final uploads that waited for `part`. The caller holds no lock."""
        for id in self.infos.finals_waiting_for(part.id):
            try:
                self.build_final(id, request)
            except TusError as error:
                log.info("The final upload %s is not built yet: %s", id, error)
            except Exception:
                # The part itself is finished and its client must hear so; the next HEAD of
                # the final upload, or the sweep, tries again.
                log.exception("The final upload %s could not be built yet", id)

    def parts_of(self, info: FileInfo) -> Sequence[FileInfo]:
        """Return the parts of a final upload in their order, repeated ones repeated.

        :raises UploadGone: if one of them is not there any more.
        """
        parts = {id: self._part(id) for id in dict.fromkeys(info.partial_uploads)}
        return [parts[id] for id in info.partial_uploads]

    def _part(self, id: str) -> FileInfo:
        try:
            part = self.infos.load(id)
        except UploadNotFound:
            raise UploadGone("A partial upload was removed.") from None
        if part.is_gone or part.state is State.REFUSED:
            raise UploadGone("A partial upload was removed.")
        return part

    @contextmanager
    def _locked_parts(self, info: FileInfo) -> Iterator[Sequence[FileInfo]]:
        parts = self.parts_of(info)
        if any(not part.is_finished for part in parts):
            # Nobody is disturbed for a final upload that cannot be built anyway.
            yield parts
            return
        with ExitStack() as locks:
            for id in sorted(set(info.partial_uploads)):
                hold = locks.enter_context(self.locker.lock(id))
                self.secure(self._part(id), hold)
            yield self.parts_of(info)

    def _remove_parts(self, final: FileInfo, request: RequestInfo) -> None:
        for id in sorted(set(final.partial_uploads)):
            try:
                with self.locker.try_lock(id) as hold:
                    part = self.infos.load(id)
                    if not part.is_gone and not self.infos.finals_waiting_for(id):
                        self.remove(part, State.TERMINATED, request, hold)
            except TusError as error:
                log.info("The part %s of %s stays: %s", id, final.id, error)
            except Exception:
                log.exception("The part %s of %s could not be removed", id, final.id)


def sum_of_sizes(parts: Sequence[FileInfo]) -> int | None:
    """Return the size of a final upload, ``None`` while a part's length is deferred.

    "The length of the final upload MUST be the sum of the length of all partial uploads."
    """
    total = 0
    for part in parts:
        if part.size is None:
            return None
        total += part.size
    return total
