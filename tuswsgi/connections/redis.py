"""Redis as stores and lockers see it: by its DSN, with the scripts that they run there.

This file owns the settings and that everybody shares one pool for each server. It does not
import redis-py, which takes longer than all of ``--help``: what uses it is in
``redis_server`` beside this one.
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
    """How records and locks are kept in Redis."""

    redis_prefix: str = option(
        "tuswsgi:",
        "What all keys and channels in Redis begin with, so that several servers can share it.",
    )


def connect(dsn: str, pool: PoolSettings | None = None) -> RedisServer:
    """Return the server of `dsn`, the same for everybody who asks. Nothing is opened.

    :param dsn: ``redis://[user:password@]host[:6379][/database]``, ``rediss://`` for TLS,
        ``unix://[user:password@]/path[?db=0]``, or
        ``redis+sentinel://[user:password@]host[:26379][,host...]/service[/database]`` with
        ``?sentinel_username=`` and ``sentinel_password=`` where the Sentinels want them
        (``rediss+sentinel://`` for TLS). Other parameters are those of redis-py's connections.
    :param pool: how many connections there are; whoever asks first decides.
    :raises ConfigurationError: if that is no DSN of Redis.
    """
    server = _servers.get(dsn)
    if server is None:
        from tuswsgi.connections.redis_server import RedisServer

        server = _servers[dsn] = RedisServer(dsn, pool or PoolSettings())
    return server
