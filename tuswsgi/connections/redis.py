"""Redis servers by DSN: callers that pass the same DSN share its connections.

This module does not import redis-py, which would take longer than all of ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.options import option

if TYPE_CHECKING:
    from tuswsgi.connections.redis_server import RedisServer

_servers: WeakValueDictionary[str, RedisServer] = WeakValueDictionary()


@dataclass(frozen=True)
class RedisSettings:
    """Options for records and locks in Redis."""

    redis_prefix: str = option(
        "tuswsgi:",
        "What all keys and channels in Redis begin with, so that several servers can share it.",
    )


def connect(dsn: str, pool: PoolSettings | None = None) -> RedisServer:
    """Return the shared server for `dsn`. Nothing is opened yet.

    :param dsn: ``redis://[user:password@]host[:6379][/database]``, ``rediss://`` for TLS,
        ``unix://[user:password@]/path[?db=0]``, or
        ``redis+sentinel://[user:password@]host[:26379][,host...]/service[/database]``
        (``rediss+sentinel://`` for TLS), with ``?sentinel_username=`` and
        ``sentinel_password=`` if the Sentinels need them. Other parameters are those of
        redis-py's connections.
    :param pool: the size of the pool; the first caller decides.
    :raises ConfigurationError: if the DSN is wrong.
    """
    server = _servers.get(dsn)
    if server is None:
        from tuswsgi.connections.redis_server import RedisServer

        server = _servers[dsn] = RedisServer(dsn, pool or PoolSettings())
    return server
