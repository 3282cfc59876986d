"""Locks in Consul, for all hosts that can ask one of its agents.

A lock is a key that is deleted with the session of its holder's process; its writer is a key
without a session. A process receives release requests by a blocking query for keys below a
prefix of its own.

Tested against a stand-in for Consul's API only, not against Consul itself.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Collection
from functools import partial
from typing import Any

from tuswsgi.connections import consul
from tuswsgi.connections.consul import (
    PORT,
    SHORTEST_SESSION,
    ConsulConnection,
    delete_key,
    is_missing,
    is_unchanged,
    lock_key,
    set_key,
)
from tuswsgi.connections.http_server import Addresses
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.session import SessionGone, SessionLocker


class ConsulLocker(SessionLocker[ConsulConnection]):
    """Exclusive locks among all processes that use one Consul.

    Consul's sessions last at least 10 s, and it may end one as late as after twice its TTL: the
    locks of a host that died are free after up to two and a half leases.

    :param locker_dsn: ``http://[:token@]host[:port]``, or ``https``; several agents are separated
        by commas.
    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    :param lock_lease: for how long a lock outlives its holder, in seconds; at least 10.
    :param host_locker: locks of this host; one is held together with each lease.
    :param pool: the size of the pool of connections, and the timeout of requests.
    :param prefix: what the keys begin with.
    :raises ConfigurationError: if the DSN is not understood.
    """

    #: The shortest lease, in seconds.
    shortest: float = SHORTEST_SESSION

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
        connect = partial(ConsulConnection, addresses, settings)
        super().__init__(
            lock_timeout,
            max(lock_lease, self.shortest),
            host_locker,
            settings.pool_timeout,
            connect,
        )
        self._prefix = prefix
        self._position = PerProcess(Position)

    def _open_session(self) -> str:
        return self._connection.get().open_session(self.session_length)

    def _renew_session(self, session: str) -> bool:
        return self._connection.get().renew_session(session)

    def _create(self, session: str, id: str, token: str) -> str | None:
        connection = self._connection.get()
        lock = self._lock_key(id)
        writer = self._writer_key(id)
        held = [is_missing(lock), lock_key(lock, token, session)]
        try:
            if connection.change([*held, is_missing(writer), set_key(writer, token)]):
                return token
            holder = connection.get(lock)
            former = connection.get(writer)
            if (
                holder is None
                and former is not None
                and connection.change([*held, is_unchanged(former)])
            ):
                return former.value
        except consul.SessionGone:
            raise SessionGone from None
        # Or the answer to an earlier attempt got lost, which was repeated at another address.
        if holder is None or former is None or holder.value != token:
            return None
        return former.value

    def _set_writer(self, id: str, token: str) -> bool:
        connection = self._connection.get()
        found = connection.get(self._lock_key(id))
        if found is None or found.value != token:
            return False
        return connection.change([is_unchanged(found), set_key(self._writer_key(id), token)])

    def _delete(self, id: str, token: str) -> None:
        connection = self._connection.get()
        found = [connection.get(key) for key in (self._lock_key(id), self._writer_key(id))]
        own = [delete_key(one) for one in found if one is not None and one.value == token]
        if own:
            connection.change(own)

    def _held_in(self, session: str, ids: Collection[str]) -> Collection[str]:
        keys = {self._lock_key(id): id for id in ids}
        return [keys[key] for key in self._connection.get().held(list(keys), session)]

    def _find_holder(self, id: str) -> tuple[str, str] | None:
        found = self._connection.get().get(self._lock_key(id))
        return (found.value, found.session) if found is not None else None

    def _put_request(self, worker: str, token: str, session: str) -> None:
        number = token.split(".")[1]
        try:
            self._connection.get().put(self._requests_to(worker) + number, token, session)
        except consul.SessionGone:
            pass  # and with it the lock

    def _listen(self, worker: str, timeout: float) -> Collection[str]:
        connection = self._connection.get()
        position = self._position.get()
        requests, index = connection.wait(self._requests_to(worker), position.index, timeout)
        # Or the next request for the is_unchanged lock would be no change.
        for request in requests:
            connection.remove(request)
        position.index = index
        return [request.value for request in requests]

    def _lock_key(self, id: str) -> str:
        return f"{self._prefix}locks/{_name(id)}"

    def _writer_key(self, id: str) -> str:
        return f"{self._prefix}writers/{_name(id)}"

    def _requests_to(self, worker: str) -> str:
        return f"{self._prefix}requests/{worker}/"


def _name(id: str) -> str:
    # Consul refuses keys with characters outside of ASCII, or that end like ".jpg".
    return urlsafe_b64encode(id.encode()).decode().rstrip("=")


class Position:
    """Where in Consul's history a process listens.

    :ivar index: Consul's index of the last change that was received.
    """

    def __init__(self) -> None:
        self.index = 0
