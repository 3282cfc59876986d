"""Finishes uploads that crashes have left complete, and cleans up at intervals.

This runs beside the requests and never interrupts one: an upload in use is left for the next
time. One process of all workers and hosts is the leader and sweeps for all. If it ends or
loses the lock, another process becomes the leader.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from tuswsgi.core.errors import TusError, UploadLocked
from tuswsgi.core.events import RequestInfo
from tuswsgi.core.info import State
from tuswsgi.lockers.base import HELD, Hold
from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings, Search, TooManyStrays, log_failures
from tuswsgi.protocol.receiving import take_over
from tuswsgi.protocol.uploads import Uploads

log = logging.getLogger(__name__)

#: The lock of the leader.
_LOCK = "tuswsgi-sweep"

#: The lock of the process that finishes uploads: the leader, or a worker that starts.
_FINISHING = "tuswsgi-finishing"

#: The most seconds until another process follows a leader that has ended.
_FOLLOW = 30.0

#: How often a leader checks between two sweeps that it still has the lock, in seconds.
_LOOK = 5.0

#: Things may be removed late by this share of their age, since a search reads everything.
_LATE = 1 / 24

#: A sweep acts for no request.
_NO_REQUEST = RequestInfo()


class _Stopped(Exception):
    """This process stops sweeping."""


class Sweeper:
    """Sweeps through all uploads of a server.

    :param settings: what to clean up, and how often.
    """

    def __init__(self, uploads: Uploads, settings: CleanUpSettings | None = None) -> None:
        self._uploads = uploads
        self._settings = settings or CleanUpSettings()
        self._stopping = threading.Event()
        #: When each search is to be done again, on the monotonic clock.
        self._due: dict[str, float] = {}

    def run(self) -> None:
        """Sweep until ``stop``, while this process is the leader."""
        is_new = True
        while not self._stopping.is_set():
            self._lead_or_follow(is_new)
            is_new = False
            self._stopping.wait(min(self._settings.interval, _FOLLOW))

    def _lead_or_follow(self, is_new: bool) -> None:
        try:
            try:
                self.lead()
            except UploadLocked:
                log.debug("Another process sweeps")
                if is_new:
                    # It may replace a worker that was killed, and the leader may be waiting.
                    self._finish_all(HELD)
        except TusError as error:
            log.warning("The sweep ended and is tried again later: %s", error)
        except _Stopped:
            log.debug("This process stops sweeping")
        except Exception:
            log.exception("The sweep failed; it is tried again later")

    def stop(self) -> None:
        """Stop after the current upload, so that another process can lead. Does not wait."""
        self._stopping.set()

    def lead(self) -> None:
        """Sweep at intervals while this process has the lock of the leader.

        :raises UploadLocked: if another process has it.
        :raises LockLost: if it was lost.
        """
        with self._uploads.locker.try_lock(_LOCK) as hold:
            while not self._stopping.is_set():
                self._sweep(hold)
                self._rest(hold)

    def sweep(self) -> None:
        """Sweep once, unless another process leads."""
        try:
            with self._uploads.locker.try_lock(_LOCK) as hold:
                self._sweep(hold)
        except UploadLocked:
            log.debug("Another process sweeps")

    def _sweep(self, hold: Hold) -> None:
        self._finish_all(hold)
        clean_up = CleanUp(self._uploads, self._settings, on_look=lambda: self._check(hold))
        for search in clean_up.searches():
            if time.monotonic() >= self._due.get(search.name, 0.0):
                self._clean_up(search)

    def _clean_up(self, search: Search) -> None:
        removed = moved = total = 0
        try:
            for removal in search.removals():
                removed += removal.is_for_good
                moved += not removal.is_for_good
                total += removal.bytes
        except TooManyStrays as error:
            log.error("%s", error)
        self._due[search.name] = time.monotonic() + search.age * _LATE
        if removed or moved:
            log.info(
                "Cleaned up %s: %d removed, %d moved to the quarantine, %d bytes",
                search.name,
                removed,
                moved,
                total,
            )

    def _rest(self, hold: Hold) -> None:
        until = time.monotonic() + self._settings.interval
        while not self._stopping.is_set() and (left := until - time.monotonic()) > 0:
            self._stopping.wait(min(left, _LOOK))
            self._check(hold)

    def _check(self, hold: Hold) -> None:
        hold.check()
        if self._stopping.is_set():
            raise _Stopped

    def _finish_all(self, hold: Hold) -> None:
        try:
            with self._uploads.locker.try_lock(_FINISHING):
                for id in self._unfinished():
                    self._check(hold)
                    with log_failures(id):
                        self._finish(id)
        except UploadLocked:
            log.debug("Another process finishes uploads")

    def _unfinished(self) -> Iterator[str]:
        for state in (State.RECEIVING, State.WAITING):
            for info in self._uploads.infos.scan(state):
                if info.size is not None or info.is_final:
                    yield info.id

    def _finish(self, id: str) -> None:
        uploads = self._uploads
        info = uploads.infos.load(id)
        if info.state is State.WAITING:
            uploads.concatenation.build(id, _NO_REQUEST)
            return
        with uploads.locker.try_lock(id) as hold:
            info = take_over(uploads.context, uploads.infos.load(id), hold)
            if info.is_gone:
                return
            info = uploads.finisher.finish_if_complete(info, _NO_REQUEST, hold)
        if info.is_finished:
            log.info("The upload %s was complete and is finished now", id)
            if info.is_partial:
                uploads.concatenation.part_finished(info, _NO_REQUEST)
