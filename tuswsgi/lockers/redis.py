"""Locks in Redis, for all hosts that use the same one.

This file owns the keys of locks and the channels by which holders are asked to let go; what
makes a lock of a key is the business of ``lease`` beside it. A lock is a key that holds its
owner's token and expires with the lease.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import RedisSettings, connect
from tuswsgi.connections.redis_scripts import Script
from tuswsgi.connections.redis_server import Subscription
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.lease import LeaseLocker

#: For how many milliseconds a mark is kept: longer than any host stands still.
_MARKED = 30 * 24 * 3600 * 1000

# ``SET NX`` for somebody who may have done it already without hearing of it.
_TAKE = Script("""
local lock, mark, token = KEYS[1], KEYS[2], ARGV[1]
local holder = redis.call('GET', lock)
if holder and holder ~= token then return false end
redis.call('SET', lock, token, 'PX', ARGV[2])
redis.call('SET', mark, token, 'NX', 'PX', ARGV[3])
return redis.call('GET', mark)
""")
_SETTLE = Script("""
local lock, mark, token = KEYS[1], KEYS[2], ARGV[1]
if redis.call('GET', lock) ~= token then return 0 end
redis.call('SET', mark, token, 'PX', ARGV[2])
return 1
""")
_GIVE_BACK = Script("""
for _, key in ipairs(KEYS) do
    if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
""")
_PROLONG = Script("""
local kept = {}
for number, key in ipairs(KEYS) do
    local token = ARGV[number + 1]
    if redis.call('GET', key) == token then
        redis.call('PEXPIRE', key, ARGV[1])
        kept[#kept + 1] = token
    end
end
return kept
""")

#: How many leases one script prolongs: nobody else is served meanwhile.
_MANY = 500


class RedisLocker(LeaseLocker):
    """Exclusive locks among all processes that use one Redis.

    They hold for as long as Redis keeps its keys. It forgets them when it is restarted
    without ``appendonly yes``, and the latest ones when a replica takes over: then another
    request may get a lock before its holder notices, which takes a third of the lease. With
    a ``maxmemory-policy`` other than ``noeviction`` it may forget any at any time.

    :param dsn: see ``connections.redis.connect``.
    """

    def __init__(
        self,
        dsn: str,
        timeout: float = 20.0,
        lease: float = 10.0,
        beside: Locker[Any] | None = None,
        *,
        pool: PoolSettings | None = None,
        settings: RedisSettings | None = None,
    ) -> None:
        super().__init__(timeout, lease, beside)
        self._server = connect(dsn, pool)
        self._prefix = (settings or RedisSettings()).redis_prefix
        self._subscriptions: dict[str, Subscription] = {}

    def prepare(self) -> None:
        super().prepare()
        self._server.prepare()
        # Whoever prepares may fork afterwards, and connections do not survive that.
        self._server.close()

    def close(self) -> None:
        super().close()
        self._server.close()

    def _take(self, id: str, token: str) -> str | None:
        mark = self._server.call(*_TAKE.on(self._keys(id), token, self._length, _MARKED))
        return None if mark is None else mark.decode()

    def _settle(self, id: str, token: str) -> bool:
        return bool(self._server.call(*_SETTLE.on(self._keys(id), token, _MARKED)))

    def _give_back(self, id: str, token: str) -> None:
        self._server.call(*_GIVE_BACK.on(self._keys(id), token))

    def _prolong(self, held: Mapping[str, str]) -> Collection[str]:
        kept: set[str] = set()
        tokens = iter(held)
        while some := list(islice(tokens, _MANY)):
            keys = [self._key(held[token]) for token in some]
            answer = self._server.call(*_PROLONG.on(keys, self._length, *some))
            kept.update(token.decode() for token in answer)
        return kept

    def _holder(self, id: str) -> str | None:
        token = self._server.call("GET", self._key(id))
        return None if token is None else token.decode()

    def _ask(self, worker: str, id: str, token: str) -> None:
        self._server.call("PUBLISH", self._channel(worker), token)

    def _hear(self, worker: str, timeout: float) -> Collection[str]:
        subscription = self._subscriptions.get(worker)
        if subscription is None:
            subscription = self._server.subscribe(self._channel(worker))
            self._subscriptions[worker] = subscription
        return [token.decode("ascii", "replace") for token in subscription.messages(timeout)]

    def _hear_no_more(self, worker: str) -> None:
        subscription = self._subscriptions.pop(worker, None)
        if subscription is not None:
            subscription.close()

    def _key(self, id: str) -> str:
        return f"{self._prefix}lock:{id}"

    def _keys(self, id: str) -> list[str]:
        """Return the keys of a lock and of its mark."""
        return [self._key(id), f"{self._prefix}mark:{id}"]

    def _channel(self, worker: str) -> str:
        return f"{self._prefix}asked:{worker}"

    @property
    def _length(self) -> int:
        """The lease in milliseconds, as Redis counts it."""
        return max(1, round(self.lease * 1000))
