"""Locks in etcd, for all hosts that use one cluster of it.

A lock is a key that expires with the lease of its holder's process; its writer is a key without
a lease. A process receives release requests by watching a key of its own.
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
    delete_key,
    has_value,
    is_missing,
    set_key,
)
from tuswsgi.connections.http_server import Addresses
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.session import SessionGone, SessionLocker


class EtcdLocker(SessionLocker[EtcdConnection]):
    """Exclusive locks among all processes that use one etcd.

    :param locker_dsn: ``http://[user:password@]host[:port]``, or ``https``; several addresses of a
        cluster are separated by commas.
    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    :param lock_lease: for how long a lock outlives its holder, in seconds; see ``SessionLocker``.
    :param host_locker: locks of this host; one is held together with each lease.
    :param pool: the size of the pool of connections, and the timeout of requests.
    :param prefix: what the keys begin with.
    :raises ConfigurationError: if the DSN is not understood.
    """

    def __init__(
        self,
        locker_dsn: str = f"http://127.0.0.1:{PORT}",
        lock_timeout: float = 20.0,
        lock_lease: float = 10.0,
        host_locker: Locker[Any] | None = None,
        pool: PoolSettings | None = None,
        prefix: str = "tuswsgi/",
    ) -> None:
        settings = pool or PoolSettings()
        addresses = Addresses.parse(locker_dsn, PORT)
        connect = partial(EtcdConnection, addresses, settings)
        super().__init__(lock_timeout, lock_lease, host_locker, settings.pool_timeout, connect)
        self._prefix = prefix
        self._position = PerProcess(Position)

    def _open_session(self) -> str:
        return self._connection.get().grant(self.session_length)

    def _renew_session(self, session: str) -> bool:
        return self._connection.get().keep_alive(session)

    def _create(self, session: str, id: str, token: str) -> str | None:
        connection = self._connection.get()
        lock = self._lock_key(id)
        writer = self._writer_key(id)
        held = [set_key(lock, token, session)]
        written = [set_key(writer, token)]
        try:
            found = connection.change(
                [is_missing(lock), is_missing(writer)], held + written, [lock, writer]
            )
            if found is None:
                return token
            holder, former = found
            if holder is None and former is not None:
                found = connection.change(
                    [is_missing(lock), has_value(writer, former)], held, [lock]
                )
                holder = token if found is None else found[0]
        except LeaseGone:
            raise SessionGone from None
        # Or the answer to an earlier attempt got lost, which was repeated at another address.
        return former if holder == token else None

    def _set_writer(self, id: str, token: str) -> bool:
        condition = has_value(self._lock_key(id), token)
        writer = self._writer_key(id)
        return self._connection.get().change([condition], [set_key(writer, token)], []) is None

    def _delete(self, id: str, token: str) -> None:
        lock = self._lock_key(id)
        writer = self._writer_key(id)
        connection = self._connection.get()
        both = [has_value(lock, token), has_value(writer, token)]
        if connection.change(both, [delete_key(lock), delete_key(writer)], []) is not None:
            connection.change([has_value(lock, token)], [delete_key(lock)], [])

    def _held_in(self, session: str, ids: Collection[str]) -> Collection[str]:
        keys = self._connection.get().keys_of(session)
        return [id for id in ids if self._lock_key(id) in keys]

    def _find_holder(self, id: str) -> tuple[str, str] | None:
        found, _ = self._connection.get().get(self._lock_key(id))
        return (found.value, found.lease) if found is not None else None

    def _put_request(self, worker: str, token: str, session: str) -> None:
        try:
            self._connection.get().put(self._request_key(worker), token, session)
        except LeaseGone:
            pass  # and with it the lock

    def _listen(self, worker: str, timeout: float) -> Collection[str]:
        connection = self._connection.get()
        position = self._position.get()
        key = self._request_key(worker)
        if position.revision is None:
            request, position.revision = connection.get(key)
            if request is not None:
                return [request.value]
        try:
            with closing(connection.changes(key, position.revision, timeout)) as requests:
                for request in requests:
                    position.revision = request.revision
                    return [request.value]
        except Compacted:
            position.revision = None
        return ()

    def _lock_key(self, id: str) -> str:
        return f"{self._prefix}locks/{id}"

    def _writer_key(self, id: str) -> str:
        return f"{self._prefix}writers/{id}"

    def _request_key(self, worker: str) -> str:
        return f"{self._prefix}requests/{worker}"


class Position:
    """Where in etcd's history a process listens.

    :ivar revision: all requests up to this revision were received.
    """

    def __init__(self) -> None:
        self.revision: int | None = None
