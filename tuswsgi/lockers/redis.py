"""Locks in Redis, for all hosts that share it.

A lock is a key that contains the holder's token and expires with the lease. Release requests
are messages on a channel of the holder's process.
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

#: For how many milliseconds a writer is kept: longer than any host is paused.
_WRITER_TTL = 30 * 24 * 3600 * 1000

# ``SET NX`` that may be repeated when the answer got lost.
_TAKE = Script("""
local lock, writer, token = KEYS[1], KEYS[2], ARGV[1]
local holder = redis.call('GET', lock)
if holder and holder ~= token then return false end
redis.call('SET', lock, token, 'PX', ARGV[2])
redis.call('SET', writer, token, 'NX', 'PX', ARGV[3])
return redis.call('GET', writer)
""")
_SET_WRITER = Script("""
local lock, writer, token = KEYS[1], KEYS[2], ARGV[1]
if redis.call('GET', lock) ~= token then return 0 end
redis.call('SET', writer, token, 'PX', ARGV[2])
return 1
""")
_FREE = Script("""
for _, key in ipairs(KEYS) do
    if redis.call('GET', key) == ARGV[1] then redis.call('DEL', key) end
end
""")
_RENEW = Script("""
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

#: How many leases one script renews: Redis serves no other client meanwhile.
_BATCH = 500


class RedisLocker(LeaseLocker):
    """Exclusive locks among all processes that use one Redis.

    Redis loses locks when it restarts without ``appendonly yes``, the latest ones when a replica
    takes over, and any with a ``maxmemory-policy`` other than ``noeviction``. Then another
    request may get a lock before its holder notices the loss, which takes a third of the lease.

    :param locker_dsn: see ``connections.redis.connect``.
    """

    def __init__(
        self,
        locker_dsn: str,
        lock_timeout: float = 20.0,
        lock_lease: float = 10.0,
        host_locker: Locker[Any] | None = None,
        *,
        pool: PoolSettings | None = None,
        settings: RedisSettings | None = None,
    ) -> None:
        super().__init__(lock_timeout, lock_lease, host_locker)
        self._server = connect(locker_dsn, pool)
        self._prefix = (settings or RedisSettings()).redis_prefix
        self._subscriptions: dict[str, Subscription] = {}

    def prepare(self) -> None:
        super().prepare()
        self._server.prepare()
        # The caller may fork, which connections do not survive.
        self._server.close()

    def close(self) -> None:
        super().close()
        self._server.close()

    def _take(self, id: str, token: str) -> str | None:
        writer = self._server.call(*_TAKE.on(self._keys(id), token, self._length, _WRITER_TTL))
        return None if writer is None else writer.decode()

    def _set_writer(self, id: str, token: str) -> bool:
        return bool(self._server.call(*_SET_WRITER.on(self._keys(id), token, _WRITER_TTL)))

    def _free(self, id: str, token: str) -> None:
        self._server.call(*_FREE.on(self._keys(id), token))

    def _renew(self, held: Mapping[str, str]) -> Collection[str]:
        kept: set[str] = set()
        tokens = iter(held)
        while batch := list(islice(tokens, _BATCH)):
            keys = [self._key(held[token]) for token in batch]
            answer = self._server.call(*_RENEW.on(keys, self._length, *batch))
            kept.update(token.decode() for token in answer)
        return kept

    def _holder(self, id: str) -> str | None:
        token = self._server.call("GET", self._key(id))
        return None if token is None else token.decode()

    def _send_request(self, worker: str, id: str, token: str) -> None:
        self._server.call("PUBLISH", self._channel(worker), token)

    def _listen(self, worker: str, timeout: float) -> Collection[str]:
        subscription = self._subscriptions.get(worker)
        if subscription is None:
            subscription = self._server.subscribe(self._channel(worker))
            self._subscriptions[worker] = subscription
        return [token.decode("ascii", "replace") for token in subscription.messages(timeout)]

    def _stop_listening(self, worker: str) -> None:
        subscription = self._subscriptions.pop(worker, None)
        if subscription is not None:
            subscription.close()

    def _key(self, id: str) -> str:
        return f"{self._prefix}lock:{id}"

    def _keys(self, id: str) -> list[str]:
        """Return the keys of a lock and of its writer."""
        return [self._key(id), f"{self._prefix}writer:{id}"]

    def _channel(self, worker: str) -> str:
        return f"{self._prefix}requests:{worker}"

    @property
    def _length(self) -> int:
        """The lease in milliseconds."""
        return max(1, round(self.lock_lease * 1000))
