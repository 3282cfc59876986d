"""Locks in Consul, for all hosts that can ask one of its agents.

A lock is a key that exists for as long as it is held and ends with the session of its
process; its mark is a key that ends with nothing. A worker hears the requests to let go by a
query that is answered when keys below a name of its own change.
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
    gone,
    key_value,
    locked,
    missing,
    same,
)
from tuswsgi.connections.http_server import Addresses
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.session import SessionGone, SessionLocker


class ConsulLocker(SessionLocker[ConsulConnection]):
    """Exclusive locks among all processes that use one Consul.

    Consul keeps no session for less than 10 s, and may take twice a session's length until it
    ends one: the locks of a host that died are free after up to two and a half leases. This
    was tested against a stand-in for Consul's API, not against Consul itself.

    :param dsn: ``http://[:token@]host[:port]``, or ``https``; several agents are separated by
        commas.
    :param timeout: how long ``lock`` waits for a holder, in seconds.
    :param lease: for how long a lock outlives its holder at least, in seconds; 10 if it is
        less.
    :param beside: locks of this host, each of which is held for as long as the lease.
    :param pool: how many connections there are, and how long Consul may take.
    :param prefix: what the keys begin with.
    :raises ConfigurationError: if the DSN is not understood.
    """

    #: The shortest lease, in seconds.
    shortest: float = SHORTEST_SESSION

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
        connect = partial(ConsulConnection, addresses, settings)
        super().__init__(timeout, max(lease, self.shortest), beside, settings.pool_timeout, connect)
        self._prefix = prefix
        self._ears = PerProcess(Ears)

    def _open_session(self) -> str:
        return self._connection.get().open_session(self.session_length)

    def _renew_session(self, session: str) -> bool:
        return self._connection.get().renew_session(session)

    def _create(self, session: str, id: str, token: str) -> str | None:
        connection = self._connection.get()
        lock = self._lock_key(id)
        mark = self._mark_key(id)
        held = [missing(lock), locked(lock, token, session)]
        try:
            if connection.change([*held, missing(mark), key_value(mark, token)]):
                return token
            holder = connection.get(lock)
            former = connection.get(mark)
            if holder is None and former is not None and connection.change([*held, same(former)]):
                return former.value
        except consul.SessionGone:
            raise SessionGone from None
        # An answer may have been lost, and the request repeated at another address.
        if holder is None or former is None or holder.value != token:
            return None
        return former.value

    def _settle(self, id: str, token: str) -> bool:
        connection = self._connection.get()
        found = connection.get(self._lock_key(id))
        if found is None or found.value != token:
            return False
        return connection.change([same(found), key_value(self._mark_key(id), token)])

    def _remove(self, id: str, token: str) -> None:
        connection = self._connection.get()
        found = [connection.get(key) for key in (self._lock_key(id), self._mark_key(id))]
        own = [gone(one) for one in found if one is not None and one.value == token]
        if own:
            connection.change(own)

    def _still_there(self, session: str, ids: Collection[str]) -> Collection[str]:
        keys = {self._lock_key(id): id for id in ids}
        return [keys[key] for key in self._connection.get().held(list(keys), session)]

    def _find(self, id: str) -> tuple[str, str] | None:
        found = self._connection.get().get(self._lock_key(id))
        return (found.value, found.session) if found is not None else None

    def _call(self, worker: str, token: str, session: str) -> None:
        number = token.split(".")[1]
        try:
            self._connection.get().put(self._calls_of(worker) + number, token, session)
        except consul.SessionGone:
            pass  # and so is the lock

    def _hear(self, worker: str, timeout: float) -> Collection[str]:
        connection = self._connection.get()
        ears = self._ears.get()
        calls, index = connection.wait(self._calls_of(worker), ears.index, timeout)
        # Or the same call would be no change the next time.
        for call in calls:
            connection.remove(call)
        ears.index = index
        return [call.value for call in calls]

    def _lock_key(self, id: str) -> str:
        return f"{self._prefix}locks/{_name(id)}"

    def _mark_key(self, id: str) -> str:
        return f"{self._prefix}marks/{_name(id)}"

    def _calls_of(self, worker: str) -> str:
        return f"{self._prefix}calls/{worker}/"


def _name(id: str) -> str:
    # Consul takes no keys with the signs of other languages, or that end like ".jpg".
    return urlsafe_b64encode(id.encode()).decode().rstrip("=")


class Ears:
    """How far a process has heard.

    :ivar index: Consul's number of the last change that was heard.
    """

    def __init__(self) -> None:
        self.index = 0
