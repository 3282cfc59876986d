"""Locks on a server that all hosts see, for as long as somebody stands up for them.

A server cannot see whether the holder of a lock is alive, so a lock is a lease: its holder
renews it, and whoever dies without a word loses it after a while. This file owns that, the
way of a release request to the holder's process, and the locks of the host that are held
beside. A backend knows how its server keeps one token per upload, and nothing else.

Where the host's own lock is held beside a lease, processes of one host find out about each
other's death at once: who holds the host's lock knows that a lease of this host's is left
over. Only the death of a whole host is waited for.

A lease that ran out may have belonged to a process that only stands still and does not know
yet. So a server keeps a mark beside each lock: the token of the last holder that may write and
has not given its lock back. Whoever finds the mark of another host's process has a lock that
is contested.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from tuswsgi.core.errors import LockLost, TusError, Unavailable, UploadInterrupted
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Hold, Locker, ReleaseRequest, ask_to_release

log = logging.getLogger(__name__)

#: The part of a lease that its holder does without, for clocks that run differently and for
#: a write that has just begun.
_MARGIN = 0.1

#: Seconds between attempts to renew while the server cannot be reached, at most.
_LONGEST_RETRY = 1.0

#: Seconds after which whoever listens for release requests looks whether it is to go on.
_HEARING = 1.0


def clock() -> float:
    """Return seconds that go on while the machine sleeps, where it can tell."""
    return time.clock_gettime(_CLOCK)


_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(eq=False)
class Lease(Hold):
    """One acquisition.

    :ivar token: names it among all acquisitions of all processes.
    :ivar ends_at: until when it is held for sure, on ``clock``.
    :ivar is_contested: see ``Hold``.
    :ivar beside: what the host's locker knows of the lock that is held beside it.
    :ivar told: whether the log says that it is lost.
    """

    id: str
    token: str
    on_release_request: ReleaseRequest | None
    ends_at: float
    locker: LeaseLocker
    beside: Any = None
    is_contested: bool = False
    told: bool = False

    def is_lost(self) -> bool:
        return clock() >= self.ends_at

    def settle(self) -> None:
        if self.is_contested:
            if not self.locker._settle(self.id, self.token):
                raise LockLost
            self.is_contested = False


class _WhileHeld:
    """A holder's callback for the lock of the host, which it has before it has the lease."""

    def __init__(self, on_release_request: ReleaseRequest) -> None:
        self._on_release_request = on_release_request
        self.is_held = False

    def __call__(self, reason: TusError) -> None:
        if self.is_held:
            self._on_release_request(reason)


class LeaseLocker(Locker[Lease]):
    """Exclusive locks among all processes that use one server.

    :param timeout: how long ``lock`` waits for a holder, in seconds.
    :param lease: for how long a lock outlives its holder, in seconds. It is renewed at a
        third of that.
    :param beside: locks of this host, each of which is held for as long as the lease.
    """

    def __init__(
        self, timeout: float = 20.0, lease: float = 10.0, beside: Locker[Any] | None = None
    ) -> None:
        super().__init__(timeout)
        self.lease = lease
        self.beside = beside
        self._keeper: PerProcess[Keeper] = PerProcess(lambda: Keeper(self))

    def prepare(self) -> None:
        if self.beside is not None:
            self.beside.prepare()

    def close(self) -> None:
        keeper = self._keeper.pop()
        if keeper is not None:
            keeper.close()
        if self.beside is not None:
            self.beside.close()

    @abstractmethod
    def _take(self, id: str, token: str) -> str | None:
        """Let `token` hold the lock of `id` for the length of a lease.

        :returns: the mark: `token` itself, which is set if there was no mark, or the one that
            a former holder has left, which stays. ``None`` while another token holds the lock.
        :raises Unavailable: if the server cannot be reached; likewise below.
        """

    @abstractmethod
    def _settle(self, id: str, token: str) -> bool:
        """Make `token` the mark, if it holds the lock of `id`; return whether it does."""

    @abstractmethod
    def _give_back(self, id: str, token: str) -> None:
        """Free the lock of `id` if `token` holds it, and remove the mark if that is `token`."""

    @abstractmethod
    def _prolong(self, held: Mapping[str, str]) -> Collection[str]:
        """Let leases run for their full length again, from now on.

        :param held: ids by tokens, all of this process. A lease that is not among them is left
            to run out.
        :returns: the tokens that still hold their locks.
        """

    @abstractmethod
    def _holder(self, id: str) -> str | None:
        """Return the token that holds the lock of `id`."""

    @abstractmethod
    def _ask(self, worker: str, id: str, token: str) -> None:
        """Let `worker` hear that somebody waits for the lock of `id`, which `token` holds."""

    @abstractmethod
    def _hear(self, worker: str, timeout: float) -> Collection[str]:
        """Wait up to `timeout` seconds for ``_ask`` to call `worker`, one of this process, and
        return the tokens that were asked for.
        """

    def _hear_no_more(self, worker: str) -> None:
        """Release what ``_hear`` needed for `worker`. It is called by who called that."""

    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> Lease | None:
        if self.beside is None:
            return self._take_lease(id, on_release_request, None)
        # Two that wait for a holder elsewhere must not send each other away.
        asked = None if on_release_request is None else _WhileHeld(on_release_request)
        beside = self.beside._try_acquire(id, asked)
        if beside is None:
            return None
        lease = None
        try:
            lease = self._take_lease(id, on_release_request, beside)
        finally:
            if lease is None:
                self.beside._release(id, beside)
        if lease is not None and asked is not None:
            asked.is_held = True
        return lease

    def _release(self, id: str, held: Lease) -> None:
        self._keeper.get().forget(held)
        try:
            self._give_back_quietly(id, held.token)
        finally:
            if self.beside is not None:
                self.beside._release(id, held.beside)

    def _request_release(self, id: str) -> None:
        if self.beside is not None:
            self.beside._request_release(id)
        try:
            token = self._holder(id)
            if token is None:
                return
            keeper = self._keeper.get()
            worker = worker_of(token)
            if worker == keeper.worker:
                keeper.call(token)
            else:
                self._ask(worker, id, token)
        except Unavailable:
            pass  # the next attempt to get the lock will say so

    def _hold_of(self, held: Lease) -> Hold:
        return held

    def _take_lease(
        self, id: str, on_release_request: ReleaseRequest | None, beside: Any
    ) -> Lease | None:
        keeper = self._keeper.get()
        name = self.beside.identify(beside) if self.beside is not None else None
        token = keeper.new_token(name)
        try:
            began = clock()
            mark = self._take(id, token)
            if mark is None and self._remove_leftover(id, token):
                began = clock()
                mark = self._take(id, token)
            if mark is None:
                return None
            lease = Lease(id, token, on_release_request, began + self._sure, self, beside)
            lease.is_contested = mark != token
            if _is_neighbour(mark, token):
                # Whoever left that mark had the lock of this host, too, which is ours now.
                lease.settle()
        except BaseException:
            # It may have been taken all the same.
            self._give_back_quietly(id, token)
            raise
        keeper.hold(lease)
        return lease

    def _remove_leftover(self, id: str, token: str) -> bool:
        """Free a lock that a process of this host has left behind; return whether it is free.

        The host's own lock is held: whoever had it let it go, and lives no more or is about
        to give the lease back.

        :param token: whose lock of this host that is.
        """
        holder = self._holder(id)
        if holder is None:
            return True
        if not _is_neighbour(holder, token):
            return False
        log.info("The holder of %s is gone; its lock is taken over", id)
        self._give_back(id, holder)
        return True

    def _give_back_quietly(self, id: str, token: str) -> None:
        try:
            self._give_back(id, token)
        except Unavailable:
            log.warning("The lock of %s cannot be given back; it is free in %.3g s", id, self.lease)

    @property
    def _sure(self) -> float:
        """For how many seconds after it was asked for a lease is held for sure."""
        return self.lease * (1 - _MARGIN)


class Keeper:
    """The leases of one process: renews them, tells of those that are lost, and hears the
    requests for them.

    A thread each does that, from the first lease on. A server that hangs holds up one of
    them, and not the one that tells of lost leases.
    """

    def __init__(self, locker: LeaseLocker) -> None:
        self.worker = secrets.token_hex(8)
        self._locker = locker
        self._pid = os.getpid()
        self._numbers = count(1)
        self._leases: dict[str, Lease] = {}
        self._any = threading.Event()
        self._closing = threading.Event()
        self._started = threading.Lock()

    def new_token(self, name: str | None) -> str:
        """Return a token for one acquisition.

        :param name: what keeps the lock of the host that is held beside it, if there is one.
        """
        return f"{self.worker}.{next(self._numbers)}.{name or ''}"

    def hold(self, lease: Lease) -> None:
        self._leases[lease.token] = lease
        self._any.set()
        if self._started.acquire(blocking=False):
            for work in (self._renew_on, self._watch, self._hear_on):
                threading.Thread(target=work, name="tuswsgi-leases", daemon=True).start()

    def forget(self, lease: Lease) -> None:
        self._leases.pop(lease.token, None)
        if not self._leases:
            self._any.clear()
            if self._leases:  # another thread's, which came in between
                self._any.set()

    def call(self, token: str, reason: TusError | None = None) -> None:
        """Ask the holder `token` to let go, if it still holds its lock."""
        lease = self._leases.get(token)
        if lease is not None:
            ask_to_release(lease.on_release_request, reason or UploadInterrupted())

    def close(self) -> None:
        self._closing.set()
        self._any.set()

    @property
    def _goes_on(self) -> bool:
        # Greenlets live on in a forked child, where the leases are still the parent's.
        return not self._closing.is_set() and os.getpid() == self._pid

    def _renew_on(self) -> None:
        pause = third = self._locker.lease / 3
        while not self._closing.wait(pause) and self._goes_on:
            reached = not self._leases or self._renew()
            pause = third if reached else min(third, _LONGEST_RETRY)

    def _renew(self) -> bool:
        """Renew all leases; return whether the server could be reached."""
        leases = list(self._leases.values())
        began = clock()
        try:
            kept = self._locker._prolong({lease.token: lease.id for lease in leases})
        except TusError as error:
            log.warning("%d locks cannot be renewed: %s", len(leases), error)
            return False
        except Exception:
            log.exception("%d locks cannot be renewed", len(leases))
            return False
        for lease in leases:
            # Nobody may go on with a lease that has ended once, however late the answer is.
            if lease.token in kept and not lease.is_lost():
                lease.ends_at = began + self._locker._sure
            else:
                lease.ends_at = -math.inf
        self._tell_of_lost()
        return True

    def _watch(self) -> None:
        pause = self._locker.lease * _MARGIN / 2
        while not self._closing.wait(pause) and self._goes_on:
            self._tell_of_lost()

    def _tell_of_lost(self) -> None:
        for lease in list(self._leases.values()):
            if lease.is_lost() and not lease.told:
                lease.told = True
                log.error("The lock of %s is lost", lease.id)
                self.call(lease.token, LockLost())

    def _hear_on(self) -> None:
        hear: Callable[[], Collection[str]] = partial(self._locker._hear, self.worker, _HEARING)
        while self._any.wait() and self._goes_on:
            try:
                for token in hear():
                    self.call(token)
            except Unavailable:
                self._closing.wait(_LONGEST_RETRY)
            except Exception:
                log.exception("Requests for locks cannot be heard")
                self._closing.wait(_LONGEST_RETRY)
        self._locker._hear_no_more(self.worker)


def worker_of(token: str) -> str:
    """Return the worker whose token this is."""
    return token.partition(".")[0]


def _is_neighbour(token: str, other: str) -> bool:
    """Whether both had the same lock of one host beside the lease, so that one is gone."""
    name = token.rpartition(".")[2]
    return bool(name) and name == other.rpartition(".")[2]
