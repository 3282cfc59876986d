"""Does what crashes left undone, and removes what has expired.

It runs beside the requests and never disturbs one: an upload in use is left for the next
time. One process at a time sweeps for all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from tuswsgi.errors import TusError, UploadLocked
from tuswsgi.hooks.base import RequestInfo
from tuswsgi.info import State
from tuswsgi.protocol.uploads import Uploads

log = logging.getLogger(__name__)

#: The lock of the one process that sweeps.
_LOCK = "tuswsgi-sweep"

#: Nobody asked for what a sweep does.
_NOBODY = RequestInfo()


class Sweeper:
    """Sweeps through all uploads of a server."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def sweep(self) -> None:
        """Sweep once, unless another process does so now."""
        try:
            with self._uploads.locker.try_lock(_LOCK):
                for id in self._unfinished():
                    self._carefully(id, self._finish)
                for id in self._uploads.infos.expired(time.time()):
                    self._carefully(id, self._uploads.expire)
        except UploadLocked:
            log.debug("Another process sweeps")

    def _unfinished(self) -> Iterator[str]:
        after = ""
        infos = self._uploads.infos
        while page := infos.list({State.RECEIVING, State.WAITING}, after=after):
            yield from (info.id for info in page if info.size is not None or info.is_final)
            after = page[-1].id

    def _carefully(self, id: str, step: Callable[[str], None]) -> None:
        try:
            step(id)
        except UploadLocked:
            log.debug("The upload %s is in use", id)
        except TusError as error:
            log.info("The upload %s stays as it is: %s", id, error)
        except Exception:
            log.exception("The upload %s could not be swept", id)

    def _finish(self, id: str) -> None:
        uploads = self._uploads
        info = uploads.infos.load(id)
        if info.state is State.WAITING:
            uploads.finisher.build_final(id, _NOBODY)
            return
        with uploads.locker.try_lock(id):
            info = uploads.infos.load(id)
            if info.is_gone:
                return
            info = uploads.finisher.finish_if_complete(info, _NOBODY)
        if info.is_finished:
            log.info("The upload %s was complete and is finished now", id)
            if info.is_partial:
                uploads.finisher.part_finished(info, _NOBODY)
