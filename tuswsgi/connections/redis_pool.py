"""Pools of connections to Redis, made from DSNs; redis-py does the work."""

from __future__ import annotations

import logging
from queue import Empty, LifoQueue
from typing import Any
from urllib.parse import urlencode

from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool, parse_url
from redis.retry import Retry
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from tuswsgi.connections.dsn import Dsn
from tuswsgi.core.errors import ConfigurationError, Unavailable

log = logging.getLogger(__name__)

_SENTINEL_PORT = 26379

#: The options that clients of Sentinels get, too.
_CONNECTION_OPTIONS = ("socket_timeout", "socket_connect_timeout", "retry", "protocol")


def make_pool(dsn: str, size: int, timeout: float) -> BlockingConnectionPool:
    """Return a pool for the server of `dsn`, see ``connections.redis.connect``.

    Nothing is opened. A pool forgets its parent's connections in a forked child.

    :param size: how many connections there are at most.
    :param timeout: seconds to wait for a free connection, for connecting and for each answer.
    :raises ConfigurationError: if the DSN is wrong. The message does not repeat it.
    """
    options: dict[str, Any] = {
        "max_connections": size,
        "timeout": timeout,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # RedisServer decides what is repeated.
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "queue_class": _Queue,
    }
    try:
        parsed = Dsn.parse(dsn)
        if parsed.scheme in ("redis+sentinel", "rediss+sentinel"):
            pool = _sentinel_pool(parsed, options)
        else:
            if parsed.scheme != "unix":
                _database(parsed.path.strip("/"))
            pool = BlockingConnectionPool.from_url(dsn, **options)
        _check_parameters(pool)
        return pool
    except (ValueError, TypeError) as error:
        reason = f": {error}" if isinstance(error, _Mistake) else ""
        raise ConfigurationError(
            "The Redis DSN is not like redis://user:password@host:6379/0, rediss://..., "
            f"unix:///path or redis+sentinel://host:26379,host2:26379/service/0{reason}."
        ) from None


class _Mistake(ValueError):
    """What is wrong with a DSN, without its secrets."""


class _Queue(LifoQueue[Any]):
    """The free connections. redis-py's error for an empty pool looks like a broken connection."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return super().get(block, timeout)
        except Empty:
            log.error("All connections to Redis were in use for %.3g s", timeout)
            raise Unavailable from None


class _ClosesWhenInterrupted:
    """Closes the connection if its greenlet is killed while it waits for an answer, which would
    be taken for the next command's. redis-py does so for connections without Sentinels.
    """

    def read_response(self, *args: Any, **options: Any) -> Any:
        options.setdefault("disconnect_on_error", True)
        return super().read_response(*args, **options)  # type: ignore[misc]


class _MasterConnection(_ClosesWhenInterrupted, SentinelManagedConnection):
    pass


class _MasterTlsConnection(_ClosesWhenInterrupted, SentinelManagedSSLConnection):
    pass


class _SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """A bounded pool of connections to the master that Sentinels name."""


def _sentinel_pool(dsn: Dsn, options: dict[str, Any]) -> BlockingConnectionPool:
    service, _, database = dsn.path.strip("/").partition("/")
    if not service:
        raise _Mistake("the name of the service is missing")
    if not dsn.hosts:
        raise _Mistake("the host of a Sentinel is missing")
    # redis-py knows the parameters and their types.
    parameters = parse_url(f"redis://localhost?{urlencode(dsn.parameters)}")
    del parameters["host"]
    login = {name: parameters.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    tls = {name: value for name, value in parameters.items() if name.startswith("ssl_")}
    tls["ssl"] = dsn.scheme == "rediss+sentinel"
    limits = {name: options[name] for name in _CONNECTION_OPTIONS}
    sentinel = Sentinel(
        [(host.name, host.port or _SENTINEL_PORT) for host in dsn.hosts],
        sentinel_kwargs={**limits, **login, **tls},
    )
    options = {
        **options,
        "username": dsn.user,
        "password": dsn.password,
        "db": _database(database),
        "connection_class": _MasterTlsConnection if tls["ssl"] else _MasterConnection,
        **parameters,
    }
    return _SentinelPool(service, sentinel, **options)  # type: ignore[no-untyped-call]


def _database(path: str) -> int:
    # redis-py takes database 0 instead of one that is not a number.
    if path and not path.isdecimal():
        raise _Mistake("the database is not a number")
    return int(path or 0)


def _check_parameters(pool: BlockingConnectionPool) -> None:
    try:
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:
        raise _Mistake("one of its parameters is not known") from error
