"""Builds final uploads of their parts (Concatenation)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tuswsgi.core.errors import MaxSizeExceeded, TusError, UploadGone
from tuswsgi.core.events import RequestInfo
from tuswsgi.core.info import FileInfo, State
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.finishing import Finisher
from tuswsgi.protocol.quota import Quota
from tuswsgi.protocol.receiving import take_over

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Concatenation:
    """Builds final uploads. The caller holds no lock."""

    context: Context
    quota: Quota
    finisher: Finisher

    def build(self, id: str, request: RequestInfo) -> FileInfo:
        """Build a waiting final upload, if all its parts are finished.

        The final upload is locked first, then the parts in the order of their ids, so that two
        builds never wait for each other.

        :returns: the final upload, still waiting if a part is unfinished.
        :raises UploadGone: if the upload or a part of it was removed: it can never be built.
        :raises MaxSizeExceeded: if the parts are too large together.
        """
        context = self.context
        with context.locker.lock(id) as hold:
            info = take_over(context, context.infos.load(id), hold)
            if info.is_gone:
                raise UploadGone
            if info.state is not State.WAITING:
                return info
            with self._locked_parts(info) as parts:
                size = sum_of_sizes(parts)
                if size is not None and size > context.max_file_size:
                    raise MaxSizeExceeded
                if any(part.state is not State.FINISHED for part in parts):
                    return info.replace(size=size)
                if self.quota.is_limited and info.size != size:
                    info = self.quota.save(info, size=size)
                info = info.replace(size=size)
                if context.data.offset(info) != size:
                    context.check_free_space(info)
                    context.data.concatenate(info, parts, hold)
                info = self.finisher.finish(info, request, hold)
        if context.settings.remove_parts and info.state is State.FINISHED:
            self._remove_parts(info, request)
        return info

    def part_finished(self, part: FileInfo, request: RequestInfo) -> None:
        """Build the final uploads that waited for a part."""
        for id in self.context.infos.finals_waiting_for(part.id):
            try:
                self.build(id, request)
            except TusError as error:
                log.info("The final upload %s is not built yet: %s", id, error)
            except Exception:
                # The part is finished, and its client is told so; the next HEAD of the final
                # upload, or the sweep, tries again.
                log.exception("The final upload %s could not be built", id)

    def parts_of(self, info: FileInfo) -> Sequence[FileInfo]:
        """Return the parts of a final upload in their order; a part may be repeated.

        :raises UploadGone: if a part was removed or refused.
        """
        parts = {id: self._part(id) for id in dict.fromkeys(info.partial_uploads)}
        return [parts[id] for id in info.partial_uploads]

    def _part(self, id: str) -> FileInfo:
        part = self.context.find(id)
        if part is None or part.is_gone or part.state is State.REFUSED:
            raise UploadGone("A partial upload was removed.")
        return part

    @contextmanager
    def _locked_parts(self, info: FileInfo) -> Iterator[Sequence[FileInfo]]:
        parts = self.parts_of(info)
        if any(not part.is_finished for part in parts):
            # The upload cannot be built, so requests that upload its parts are not interrupted.
            yield parts
            return
        with ExitStack() as locks:
            for id in sorted(set(info.partial_uploads)):
                hold = locks.enter_context(self.context.locker.lock(id))
                take_over(self.context, self._part(id), hold)
            yield self.parts_of(info)

    def _remove_parts(self, final: FileInfo, request: RequestInfo) -> None:
        infos = self.context.infos
        for id in sorted(set(final.partial_uploads)):
            try:
                with self.context.locker.try_lock(id) as hold:
                    part = infos.load(id)
                    if not part.is_gone and not infos.finals_waiting_for(id):
                        self.context.remove(part, State.TERMINATED, request, hold)
            except TusError as error:
                log.info("The part %s of %s is not removed: %s", id, final.id, error)
            except Exception:
                log.exception("The part %s of %s could not be removed", id, final.id)


def sum_of_sizes(parts: Sequence[FileInfo]) -> int | None:
    """Return the size of a final upload, ``None`` while the length of a part is deferred.

    "The length of the final upload MUST be the sum of the length of all partial uploads."
    """
    total = 0
    for part in parts:
        if part.size is None:
            return None
        total += part.size
    return total
