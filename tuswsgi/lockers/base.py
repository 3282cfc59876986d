"""The interface of lockers, and the waiting that they share.

Only one request at a time may write an upload. A request that finds the lock held asks the
holder to release it, so that a connection that died silently never blocks a resumed upload: the
holder stores what it has received and stops. A locker implements the attempt, the release and
the release request; ``Locker`` implements waiting and the timeout. ``tuswsgi.testing.lockers``
tests the contract.
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

#: Called with the reason when a holder should release its lock. It is called in another greenlet
#: or thread, maybe several times and maybe a moment after the release, and must not block.
ReleaseRequest = Callable[[TusError], None]

#: Tells whether a held lock is lost, see ``Hold.is_lost``.
IsLost = Callable[[], bool]

logger = logging.getLogger(__name__)

#: A locker's own data about a lock that it holds.
H = TypeVar("H")


class Hold:
    """A lock, as its holder sees it. This one cannot be lost while its process lives.

    A holder calls ``check`` before each step that others rely on. The process may pause between
    the check and the step, so a late write must do no harm either: the next holder fences off
    the former one by sealing the upload first.

    :ivar needs_fencing: the former holder has lost the lock rather than released it. It may
        still be running and write. This stays true for later holders, too, until one of them
        calls ``confirm_fenced``.
    """

    __slots__ = ()

    needs_fencing: bool = False

    def is_lost(self) -> bool:
        """Whether another holder may have the lock now. Does not block."""
        return False

    def check(self) -> None:
        """Check before a step that the lock is still held.

        :raises LockLost: if it is lost.
        """
        if self.is_lost():
            raise LockLost

    def confirm_fenced(self) -> None:
        """Record that the former holder cannot do harm any more.

        :raises LockLost: if this lock is lost by now.
        :raises Unavailable: if the locker's server cannot be reached.
        """


class _AlwaysHeld(Hold):
    __slots__ = ()

    def check(self) -> None:
        pass  # saves a call: most servers only have such locks


#: A hold that cannot be lost.
HELD: Hold = _AlwaysHeld()


def request_release(on_release_request: ReleaseRequest | None, reason: TusError) -> None:
    """Call a holder's callback, for a locker. Its failure is logged: the caller is a waiter, or
    the thread that serves all holders.
    """
    if on_release_request is None:
        return
    try:
        on_release_request(reason)
    except Exception:
        logger.exception("The release request failed at the holder of a lock")


class Locker(ABC, Generic[H]):
    """Exclusive locks by upload id, among all processes that share the locker.

    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    """

    #: Between attempts: a holder that receives a body stops within milliseconds, one that runs a
    #: hook takes longer.
    backoff = Backoff(first=0.002, longest=0.05)

    #: Seconds between release requests. One may get lost, and the holder may have changed.
    request_pause = 0.1

    def __init__(self, lock_timeout: float = 20.0) -> None:
        self.lock_timeout = lock_timeout

    def prepare(self) -> None:
        """Get ready. May be called again, and by several processes at once.

        :raises ConfigurationError: if the locker cannot work as configured.
        """

    def close(self) -> None:
        """Release what this process holds. The locker may be used again afterwards."""

    def check(self) -> None:
        """Check that locks can be acquired now. Cheap enough to be called often.

        :raises Exception: if they cannot.
        """
        try:
            with self.try_lock(f"tuswsgi-check-{os.getpid()}"):
                pass
        except UploadLocked:
            pass  # held by the process of another host with the same id

    def lock(
        self, id: str, on_release_request: ReleaseRequest | None = None
    ) -> AbstractContextManager[Hold]:
        """Hold the lock of `id` during a ``with`` block. It is not reentrant.

        A present holder is asked to release it.

        :param on_release_request: called when another request waits for this lock, or when the
            lock is lost. ``None`` is for holders that need only a moment.
        :raises UploadLocked: if the holder did not release it within the timeout.
        """
        return _Holding(self, id, partial(self._acquire, id, on_release_request))

    def try_lock(
        self, id: str, on_release_request: ReleaseRequest | None = None
    ) -> AbstractContextManager[Hold]:
        """Hold the lock of `id` during a ``with`` block, without waiting or asking for it.

        :raises UploadLocked: if it is held.
        """
        return _Holding(self, id, partial(self._try_acquire, id, on_release_request))

    def _acquire(self, id: str, on_release_request: ReleaseRequest | None) -> H:
        began = time.monotonic()
        deadline = began + self.lock_timeout
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
        """Return what the holder gets to see of its lock."""
        return HELD

    def identify(self, held: H) -> str | None:
        """Return a name for the thing that is locked, which is never used for another one.

        Two holds of the same name exclude each other. So the earlier holder has released its
        lock or died. The name consists of letters, digits and hyphens; ``None`` if the locker
        has no such names.
        """
        return None

    @abstractmethod
    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> H | None:
        """Take the lock if it is free, without waiting; ``None`` if it is not."""

    @abstractmethod
    def _release(self, id: str, held: H) -> None:
        """Release the lock. Must not fail because it was lost already."""

    @abstractmethod
    def _request_release(self, id: str) -> None:
        """Ask the present holder, wherever it is, to release the lock. Must not wait or fail.

        The request must not reach a later holder.
        """


class _Holding(AbstractContextManager[Hold], Generic[H]):
    """Holds a lock during a ``with`` block.

    Not a generator, which is larger: every slow connection has one of these.
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
