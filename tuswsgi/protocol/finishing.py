"""Finishes an upload once all its bytes are stored.

Each step may be cut off by the death of the process. The upload then stays complete but
unfinished, and the next HEAD or PATCH, or the sweep, finishes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tuswsgi.core.errors import HookRefusal
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo, FinalResponse, State
from tuswsgi.lockers.base import Hold
from tuswsgi.observing.signals import tell, upload_finished
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.receiving import stored_offset


@dataclass(frozen=True)
class Finisher:
    """Finishes uploads. The caller holds the upload's lock."""

    context: Context

    def finish_if_complete(self, info: FileInfo, request: RequestInfo, hold: Hold) -> FileInfo:
        """Return an upload with the offset that is stored, finished if that is its length.

        :raises TusError: as ``finish``.
        """
        if info.is_finished:
            return info
        offset = stored_offset(self.context, info, hold)
        if offset == info.size:
            return self.finish(info, request, hold)
        return info.replace(offset=offset)

    def finish(self, info: FileInfo, request: RequestInfo, hold: Hold) -> FileInfo:
        """Finish an upload whose bytes are all stored.

        :returns: the record of the finished or refused upload.
        :raises TusError: if it cannot be finished now.
        """
        finished, events = self.prepare(info, request, hold)
        hold.check()
        saved = self.context.infos.save(finished, events)
        if saved.storage is not info.storage:
            self.context.data.delete_leftovers(info)
        self.announce(saved, request)
        return saved

    def prepare(
        self, info: FileInfo, request: RequestInfo, hold: Hold
    ) -> tuple[FileInfo, Sequence[Event]]:
        """Do what comes before the record of a finished upload is written.

        :returns: the record, and the events to write with it.
        """
        assert info.size is not None
        storage = self.context.data.finish(info, hold)
        info = info.replace(offset=info.size, storage=storage)
        hooks = self.context.hooks
        try:
            answer = hooks.ask(HookType.PRE_FINISH, info, request)
        except HookRefusal as refusal:
            if refusal.status >= 500:
                raise
            # A hook's 4xx is final: it is stored, and repeated to whoever asks.
            response = FinalResponse(refusal.status, refusal.message, refusal.headers)
            return info.replace(state=State.REFUSED, finished_at=time.time(), response=response), ()
        if answer is not None:
            response = FinalResponse(answer.status, answer.body or "", answer.headers)
            info = info.replace(response=response)
        info = info.replace(state=State.FINISHED, finished_at=time.time())
        return info, self.context.outbox.events_for(HookType.POST_FINISH, info, request)

    def announce(self, info: FileInfo, request: RequestInfo) -> None:
        """Tell hooks and receivers of signals that an upload is finished; not if it was refused."""
        if info.state is State.FINISHED:
            self.context.outbox.tell(HookType.POST_FINISH, info, request)
            tell(upload_finished, self.context.sender, info)
