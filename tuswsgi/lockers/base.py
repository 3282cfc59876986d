"""The contract of lockers, and all the waiting that they have in common.

One request at a time writes an upload. A request that wants in asks the holder to let
go, so that a connection that died without saying so never blocks a resume: the holder
stores what it has and leaves. A backend implements the attempt, the release and the
request; this base class owns waiting, the timeout and the error. The contract is tested
by ``tuswsgi.testing.lockers``.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Generic, TypeVar

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import LockLost, TusError, UploadLocked
from tuswsgi.observing.telemetry import lock_waited, report

#: Called with the reason when a holder shall let go. It is called in another greenlet or
#: thread, maybe several times and maybe a moment after the release, and must not block.
ReleaseRequest = Callable[[TusError], None]

#: Tells whether a lock that is held is lost, see ``Hold.is_lost``.
IsLost = Callable[[], bool]

logger = logging.getLogger(__name__)

#: What a backend knows about a lock that it holds.
H = TypeVar("H")


class Hold:
    """A lock as its holder has it. This one cannot be lost while its process lives.

    A holder asks before each step that changes what others rely on. Between question and
    step the process may stand still for long, so the data has to forgive a late writer as
    well: whoever takes a lock over that was lost seals the upload first.

    :ivar is_contested: the holder before lost the lock instead of giving it back. It may not
        know that yet, and write on. It stays so for the next holder, too, unless ``settle``
        was called.
    """

    __slots__ = ()

    is_contested: bool = False

    def is_lost(self) -> bool:
        """Whether somebody else may have the lock. Waits for nothing."""
        return False

    def check(self) -> None:
        """Ask ``is_lost`` before a step.

        :raises LockLost: if it is.
        """
        if self.is_lost():
            raise LockLost

    def settle(self) -> None:
        """Tell that nothing which the holder before still does can do harm any more.

        :raises LockLost: if the lock is lost by now.
        :raises Unavailable: if the locker cannot be told.
        """


class _Sure(Hold):
    __slots__ = ()

    def check(self) -> None:
        pass  # without a question: most servers have no other locks


#: The hold on whatever nobody else can have.
SURE: Hold = _Sure()


def ask_to_release(on_release_request: ReleaseRequest | None, reason: TusError) -> None:
    """Call a holder back, for a backend. A callback that fails is logged and does no harm:
    it is called by the waiter or by the watcher that serves all holders.
    """
    if on_release_request is None:
        return
    try:
        on_release_request(reason)
    except Exception:
        logger.exception("A holder of a lock failed to take the request to let go")


class Locker(ABC, Generic[H]):
    """Exclusive locks by upload id, for all processes that share the locker.

    :param timeout: how long ``lock`` waits for a holder, in seconds.
    """

    #: Between attempts: a holder in mid-body leaves within milliseconds, one that runs a hook
    #: takes its time.
    backoff = Backoff(first=0.002, longest=0.05)

    #: Seconds between two requests to one holder. A request may be lost, and the holder may
    #: be another one than a moment ago.
    request_pause = 0.1

    def __init__(self, timeout: float = 20.0) -> None:
        self.timeout = timeout

    def prepare(self) -> None:
        """Make ready for use. May be called again, and by several processes at once.

        :raises ConfigurationError: if the locker cannot work as it is configured.
        """

    def close(self) -> None:
        """Release what this process holds. The locker may be used again afterwards."""

    def check(self) -> None:
        """Find out, at little cost, whether locks can be had now. May be called often.

        :raises Exception: if they cannot.
        """
        try:
            with self.try_lock(f"tuswsgi-check-{os.getpid()}"):
                pass
        except UploadLocked:
            pass  # another host has a process of this number

    def lock(
        self, id: str, on_release_request: ReleaseRequest | None = None
    ) -> AbstractContextManager[Hold]:
        """Hold the lock of `id` for the length of a ``with`` block.

        A present holder is asked to let go. The lock is not reentrant.

        :param on_release_request: called when somebody waits for this lock, or when the
            lock was lost. ``None`` is for a holder that is done soon anyway.
        :raises UploadLocked: if the holder did not let go within the timeout.
        """
        return _Holding(self, id, partial(self._acquire, id, on_release_request))

    def try_lock(
        self, id: str, on_release_request: ReleaseRequest | None = None
    ) -> AbstractContextManager[Hold]:
        """Hold the lock of `id`, but only if nobody else does; a holder is not disturbed.

        :raises UploadLocked: if somebody holds it.
        """
        return _Holding(self, id, partial(self._try_acquire, id, on_release_request))

    def _acquire(self, id: str, on_release_request: ReleaseRequest | None) -> H:
        began = time.monotonic()
        deadline = began + self.timeout
        attempts = 0
        next_request = 0.0
        while True:
            held = self._try_acquire(id, on_release_request)
            if held is not None:
                if next_request and lock_waited.receivers:
                    self._report_wait(began, acquired=True)
                return held
            now = time.monotonic()
            if now >= next_request:
                self._request_release(id)
                next_request = now + self.request_pause
            if now >= deadline:
                if lock_waited.receivers:
                    self._report_wait(began, acquired=False)
                raise UploadLocked
            attempts += 1
            time.sleep(min(self.backoff.after(attempts), deadline - now))

    def _report_wait(self, began: float, *, acquired: bool) -> None:
        report(lock_waited, self, seconds=time.monotonic() - began, acquired=acquired)

    def _hold_of(self, held: H) -> Hold:
        """Return the lock as its holder is to have it."""
        return SURE

    def identify(self, held: H) -> str | None:
        """Return a name for what keeps a lock that is held, which was never another one's name:
        whoever had a lock by that name, and lives, has it no more. Letters, digits and hyphens;
        ``None`` if there is none.
        """
        return None

    @abstractmethod
    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> H | None:
        """Take the lock if it is free, without waiting; ``None`` if it is not."""

    @abstractmethod
    def _release(self, id: str, held: H) -> None:
        """Give the lock back. Must not fail because the lock was lost already."""

    @abstractmethod
    def _request_release(self, id: str) -> None:
        """Ask the present holder, wherever it is, to let go. Must not wait for it or fail.

        The request is for that holder only: one that comes after it must not be met.
        """


class _Holding(AbstractContextManager[Hold], Generic[H]):
    """A lock that is held for the length of a ``with`` block.

    Not a generator: every slow connection keeps one of these.
    """

    __slots__ = ("_acquire", "_held", "_id", "_locker")
    _held: H

    def __init__(self, locker: Locker[H], id: str, acquire: Callable[[], H | None]) -> None:
        self._locker = locker
        self._id = id
        self._acquire = acquire

    def __enter__(self) -> Hold:
        held = self._acquire()
        if held is None:
            raise UploadLocked
        self._held = held
        return self._locker._hold_of(held)

    def __exit__(self, *_: object) -> None:
        self._locker._release(self._id, self._held)
