"""Locks in etcd, for all hosts that use one cluster of it.

A lock is a key that exists for as long as it is held and ends with the lease of its
process; its mark is a key that ends with nothing. A worker hears the requests to let go by
watching one key of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from functools import partial
from typing import Any

from tuswsgi.connections.etcd import (
    PORT,
    Compacted,
    EtcdConnection,
    LeaseGone,
    gone,
    key_value,
    missing,
    same,
)
from tuswsgi.connections.http_server import Addresses
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.session import SessionGone, SessionLocker


class EtcdLocker(SessionLocker[EtcdConnection]):
    """Exclusive locks among all processes that use one etcd.

    :param dsn: ``http://[user:password@]host[:port]``, or ``https``; several addresses of a
        cluster are separated by commas.
    :param timeout: how long ``lock`` waits for a holder, in seconds.
    :param lease: for how long a lock outlives its holder, in seconds; see ``SessionLocker``.
    :param beside: locks of this host, each of which is held for as long as the lease.
    :param pool: how many connections there are, and how long etcd may take.
    :param prefix: what the keys begin with.
    :raises ConfigurationError: if the DSN is not understood.
    """

    def __init__(
        self,
        dsn: str = f"http://127.0.0.1:{PORT}",
        timeout: float = 20.0,
        lease: float = 10.0,
        beside: Locker[Any] | None = None,
        pool: PoolSettings | None = None,
        prefix: str = "tuswsgi/",
    ) -> None:
        settings = pool or PoolSettings()
        addresses = Addresses.parse(dsn, PORT)
        connect = partial(EtcdConnection, addresses, settings)
        super().__init__(timeout, lease, beside, settings.pool_timeout, connect)
        self._prefix = prefix
        self._ears = PerProcess(Ears)

    def _open_session(self) -> str:
        return self._connection.get().grant(self.session_length)

    def _renew_session(self, session: str) -> bool:
        return self._connection.get().keep_alive(session)

    def _create(self, session: str, id: str, token: str) -> str | None:
        connection = self._connection.get()
        lock = self._lock_key(id)
        mark = self._mark_key(id)
        held = [key_value(lock, token, session)]
        marked = [key_value(mark, token)]
        try:
            found = connection.change([missing(lock), missing(mark)], held + marked, [lock, mark])
            if found is None:
                return token
            holder, former = found
            if holder is None and former is not None:
                found = connection.change([missing(lock), same(mark, former)], held, [lock])
                holder = token if found is None else found[0]
        except LeaseGone:
            raise SessionGone from None
        # An answer may have been lost, and the request repeated at another address.
        return former if holder == token else None

    def _settle(self, id: str, token: str) -> bool:
        condition = same(self._lock_key(id), token)
        mark = self._mark_key(id)
        return self._connection.get().change([condition], [key_value(mark, token)], []) is None

    def _remove(self, id: str, token: str) -> None:
        lock = self._lock_key(id)
        mark = self._mark_key(id)
        connection = self._connection.get()
        both = [same(lock, token), same(mark, token)]
        if connection.change(both, [gone(lock), gone(mark)], []) is not None:
            connection.change([same(lock, token)], [gone(lock)], [])

    def _still_there(self, session: str, ids: Collection[str]) -> Collection[str]:
        keys = self._connection.get().keys_of(session)
        return [id for id in ids if self._lock_key(id) in keys]

    def _find(self, id: str) -> tuple[str, str] | None:
        found, _ = self._connection.get().get(self._lock_key(id))
        return (found.value, found.lease) if found is not None else None

    def _call(self, worker: str, token: str, session: str) -> None:
        try:
            self._connection.get().put(self._call_key(worker), token, session)
        except LeaseGone:
            pass  # and so is the lock

    def _hear(self, worker: str, timeout: float) -> Collection[str]:
        connection = self._connection.get()
        ears = self._ears.get()
        key = self._call_key(worker)
        if ears.heard is None:
            call, ears.heard = connection.get(key)
            if call is not None:
                return [call.value]
        try:
            with closing(connection.changes(key, ears.heard, timeout)) as calls:
                for call in calls:
                    ears.heard = call.revision
                    return [call.value]
        except Compacted:
            ears.heard = None
        return ()

    def _lock_key(self, id: str) -> str:
        return f"{self._prefix}locks/{id}"

    def _mark_key(self, id: str) -> str:
        return f"{self._prefix}marks/{id}"

    def _call_key(self, worker: str) -> str:
        return f"{self._prefix}calls/{worker}"


class Ears:
    """How far a process has heard.

    :ivar heard: etcd's revision until which all requests were heard.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
