"""Locks on a server that all hosts share, as leases that their holders renew.

A server cannot tell whether the holder of a lock is alive. So a lock is a lease: its holder
renews it, and the lock of a holder that died is free when the lease expires. This module renews
leases, notices lost ones, and passes release requests on to holders. A subclass stores one
token per upload on its server.

With a ``host_locker`` each lease is held together with the host's own lock. Then processes of
one host notice each other's death at once: a process that gets the host's lock may take over a
lease of this host. Only after the death of a whole host do others wait for its leases to expire.

A holder whose lease expired may be paused rather than dead, and not know that it lost the lock.
So a server also stores the *writer* of each lock: the token of the last holder that may write
and has not released the lock. A new holder that finds the writer of another host has to fence it
off before it writes, see ``Hold.needs_fencing``.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from tuswsgi.core.errors import LockLost, TusError, Unavailable, UploadInterrupted
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Hold, Locker, ReleaseRequest, request_release

log = logging.getLogger(__name__)

#: The part of a lease that its holder does not use, to allow for clocks that run at different
#: speeds and for a write that has just begun.
_MARGIN = 0.1

#: The longest pause between attempts to renew while the server cannot be reached, in seconds.
_LONGEST_RETRY = 1.0

#: For how many seconds the listener waits before it checks whether it should stop.
_LISTEN_TIMEOUT = 1.0


def clock() -> float:
    """Return seconds on a clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(_CLOCK)


_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(eq=False)
class Lease(Hold):
    """One acquisition.

    :ivar token: unique among all acquisitions of all processes.
    :ivar ends_at: until when it is certainly held, on ``clock``.
    :ivar needs_fencing: see ``Hold``.
    :ivar host_lock: what the host locker returned for the lock that is held with the lease.
    :ivar is_reported: whether the holder was told that the lock is lost.
    """

    id: str
    token: str
    on_release_request: ReleaseRequest | None
    ends_at: float
    locker: LeaseLocker
    host_lock: Any = None
    needs_fencing: bool = False
    is_reported: bool = False

    def is_lost(self) -> bool:
        return clock() >= self.ends_at

    def confirm_fenced(self) -> None:
        if self.needs_fencing:
            if not self.locker._set_writer(self.id, self.token):
                raise LockLost
            self.needs_fencing = False


class _OnceHeld:
    """A callback for the host's lock, which does nothing until the lease is held, too."""

    def __init__(self, on_release_request: ReleaseRequest) -> None:
        self._on_release_request = on_release_request
        self.is_held = False

    def __call__(self, reason: TusError) -> None:
        if self.is_held:
            self._on_release_request(reason)


class LeaseLocker(Locker[Lease]):
    """Exclusive locks among all processes that use one server.

    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    :param lock_lease: for how long a lock outlives its holder, in seconds. It is renewed after a
        third of that.
    :param host_locker: locks of this host; one is held together with each lease.
    """

    def __init__(
        self,
        lock_timeout: float = 20.0,
        lock_lease: float = 10.0,
        host_locker: Locker[Any] | None = None,
    ) -> None:
        super().__init__(lock_timeout)
        self.lock_lease = lock_lease
        self.host_locker = host_locker
        self._manager: PerProcess[LeaseManager] = PerProcess(lambda: LeaseManager(self))

    def prepare(self) -> None:
        if self.host_locker is not None:
            self.host_locker.prepare()

    def close(self) -> None:
        manager = self._manager.pop()
        if manager is not None:
            manager.close()
        if self.host_locker is not None:
            self.host_locker.close()

    @abstractmethod
    def _take(self, id: str, token: str) -> str | None:
        """Take the lock of `id` for `token`, for the length of a lease, unless it is held.

        If the lock has no writer, `token` becomes the writer.

        :returns: the writer of the lock, or ``None`` if another token holds the lock.
        :raises Unavailable: if the server cannot be reached; also by the methods below.
        """

    @abstractmethod
    def _set_writer(self, id: str, token: str) -> bool:
        """Make `token` the writer if it holds the lock of `id`; return whether it does."""

    @abstractmethod
    def _free(self, id: str, token: str) -> None:
        """Free the lock of `id` if `token` holds it, and forget the writer if that is `token`."""

    @abstractmethod
    def _renew(self, held: Mapping[str, str]) -> Collection[str]:
        """Let leases run for their full length again.

        :param held: ids by tokens, all of this process. Leases that are missing here expire.
        :returns: the tokens that still hold their locks.
        """

    @abstractmethod
    def _holder(self, id: str) -> str | None:
        """Return the token that holds the lock of `id`."""

    @abstractmethod
    def _send_request(self, worker: str, id: str, token: str) -> None:
        """Send a release request for `token`, the holder of `id`, to its process `worker`."""

    @abstractmethod
    def _listen(self, worker: str, timeout: float) -> Collection[str]:
        """Wait up to `timeout` seconds for release requests to `worker`, this process.

        :returns: the tokens that are to release their locks.
        """

    def _stop_listening(self, worker: str) -> None:
        """Release what ``_listen`` needed for `worker`. Called by the thread that listened."""

    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> Lease | None:
        if self.host_locker is None:
            return self._take_lease(id, on_release_request, None)
        # Two requests that wait for a holder elsewhere must not interrupt each other.
        callback = None if on_release_request is None else _OnceHeld(on_release_request)
        host_lock = self.host_locker._try_acquire(id, callback)
        if host_lock is None:
            return None
        lease = None
        try:
            lease = self._take_lease(id, on_release_request, host_lock)
        finally:
            if lease is None:
                self.host_locker._release(id, host_lock)
        if lease is not None and callback is not None:
            callback.is_held = True
        return lease

    def _release(self, id: str, held: Lease) -> None:
        self._manager.get().remove(held)
        try:
            self._free_if_possible(id, held.token)
        finally:
            if self.host_locker is not None:
                self.host_locker._release(id, held.host_lock)

    def _request_release(self, id: str) -> None:
        if self.host_locker is not None:
            self.host_locker._request_release(id)
        try:
            token = self._holder(id)
            if token is None:
                return
            manager = self._manager.get()
            worker = worker_of(token)
            if worker == manager.worker:
                manager.request_release(token)
            else:
                self._send_request(worker, id, token)
        except Unavailable:
            pass  # the next attempt to take the lock raises it, too

    def _hold_of(self, held: Lease) -> Hold:
        return held

    def _take_lease(
        self, id: str, on_release_request: ReleaseRequest | None, host_lock: Any
    ) -> Lease | None:
        manager = self._manager.get()
        name = self.host_locker.identify(host_lock) if self.host_locker is not None else None
        token = manager.new_token(name)
        try:
            began = clock()
            writer = self._take(id, token)
            if writer is None and self._free_leftover(id, token):
                began = clock()
                writer = self._take(id, token)
            if writer is None:
                return None
            lease = Lease(id, token, on_release_request, began + self._safe, self, host_lock)
            lease.needs_fencing = writer != token
            if _have_same_host_lock(writer, token):
                # That writer also held the host's lock, which is ours now.
                lease.confirm_fenced()
        except BaseException:
            # The server may have given us the lock all the same.
            self._free_if_possible(id, token)
            raise
        manager.add(lease)
        return lease

    def _free_leftover(self, id: str, token: str) -> bool:
        """Free a lock whose holder was on this host; return whether the lock is free now.

        We hold the host's lock. So that holder has released it: it is dead, or about to free
        the lease.

        :param token: ours.
        """
        holder = self._holder(id)
        if holder is None:
            return True
        if not _have_same_host_lock(holder, token):
            return False
        log.info("The holder of the lock of %s has died; the lock is taken over", id)
        self._free(id, holder)
        return True

    def _free_if_possible(self, id: str, token: str) -> None:
        try:
            self._free(id, token)
        except Unavailable:
            log.warning("Cannot release the lock of %s; it expires in %.3g s", id, self.lock_lease)

    @property
    def _safe(self) -> float:
        """For how many seconds after the request for it a lease is certainly held."""
        return self.lock_lease * (1 - _MARGIN)


class LeaseManager:
    """The leases of one process: renews them, reports lost ones, and passes requests on.

    From the first lease on, each of these has a thread. So a server that hangs stops one of
    them, but not the one that reports lost leases.
    """

    def __init__(self, locker: LeaseLocker) -> None:
        self.worker = secrets.token_hex(8)
        self._locker = locker
        self._pid = os.getpid()
        self._numbers = count(1)
        self._leases: dict[str, Lease] = {}
        self._has_leases = threading.Event()
        self._closing = threading.Event()
        self._started = threading.Lock()

    def new_token(self, name: str | None) -> str:
        """Return a token for one acquisition.

        :param name: of the host's lock that is held with the lease, if there is one.
        """
        return f"{self.worker}.{next(self._numbers)}.{name or ''}"

    def add(self, lease: Lease) -> None:
        self._leases[lease.token] = lease
        self._has_leases.set()
        if self._started.acquire(blocking=False):
            for loop in (self._renew_leases, self._watch, self._listen):
                threading.Thread(target=loop, name="tuswsgi-leases", daemon=True).start()

    def remove(self, lease: Lease) -> None:
        self._leases.pop(lease.token, None)
        if not self._leases:
            self._has_leases.clear()
            if self._leases:  # another thread has added one meanwhile
                self._has_leases.set()

    def request_release(self, token: str, reason: TusError | None = None) -> None:
        """Ask the holder `token` to release its lock, unless it has done so."""
        lease = self._leases.get(token)
        if lease is not None:
            request_release(lease.on_release_request, reason or UploadInterrupted())

    def close(self) -> None:
        self._closing.set()
        self._has_leases.set()

    @property
    def _is_running(self) -> bool:
        # Greenlets live on in a forked child, where the leases are still the parent's.
        return not self._closing.is_set() and os.getpid() == self._pid

    def _renew_leases(self) -> None:
        pause = third = self._locker.lock_lease / 3
        while not self._closing.wait(pause) and self._is_running:
            was_reached = not self._leases or self._renew()
            pause = third if was_reached else min(third, _LONGEST_RETRY)

    def _renew(self) -> bool:
        """Renew all leases; return whether the server could be reached."""
        leases = list(self._leases.values())
        began = clock()
        try:
            kept = self._locker._renew({lease.token: lease.id for lease in leases})
        except TusError as error:
            log.warning("Cannot renew %d locks: %s", len(leases), error)
            return False
        except Exception:
            log.exception("Cannot renew %d locks", len(leases))
            return False
        for lease in leases:
            # A lease that has expired stays lost, even if the server still renewed it.
            if lease.token in kept and not lease.is_lost():
                lease.ends_at = began + self._locker._safe
            else:
                lease.ends_at = -math.inf
        self._report_lost()
        return True

    def _watch(self) -> None:
        pause = self._locker.lock_lease * _MARGIN / 2
        while not self._closing.wait(pause) and self._is_running:
            self._report_lost()

    def _report_lost(self) -> None:
        for lease in list(self._leases.values()):
            if lease.is_lost() and not lease.is_reported:
                lease.is_reported = True
                log.error("The lock of %s is lost", lease.id)
                self.request_release(lease.token, LockLost())

    def _listen(self) -> None:
        while self._has_leases.wait() and self._is_running:
            try:
                for token in self._locker._listen(self.worker, _LISTEN_TIMEOUT):
                    self.request_release(token)
            except Unavailable:
                self._closing.wait(_LONGEST_RETRY)
            except Exception:
                log.exception("Cannot listen for release requests")
                self._closing.wait(_LONGEST_RETRY)
        self._locker._stop_listening(self.worker)


def worker_of(token: str) -> str:
    """Return the process that made `token`."""
    return token.partition(".")[0]


def _have_same_host_lock(token: str, other: str) -> bool:
    """Whether two tokens belong to the same lock of one host, so that one has released it."""
    name = token.rpartition(".")[2]
    return bool(name) and name == other.rpartition(".")[2]
