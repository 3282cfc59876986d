"""Where a Redis server is: its DSN, and the Sentinels that know who is the master.

This file owns DSNs, and makes connections of redis-py that are not open yet. What becomes of
a connection is the business of ``redis_server`` beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from tuswsgi.core.errors import ConfigurationError

_SENTINEL_PORT = 26379


class Address(NamedTuple):
    """A server that can be connected to.

    :param shown: its name for people, without a password.
    :param finder: returns what makes connections, for one process.
    """

    shown: str
    finder: Callable[[], Callable[[], Connection]]


def address_of(dsn: str, timeout: float) -> Address:
    """Return the server of a DSN, see ``connections.redis.connect``.

    :param timeout: how long to wait for a connection and for each answer, in seconds.
    :raises ConfigurationError: if that is no such DSN; it does not repeat the DSN, which may
        have a password.
    """
    limits = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # Who waits is to be told soon; what is repeated is decided elsewhere.
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    try:
        if dsn.partition("://")[0].lower() in ("redis+sentinel", "rediss+sentinel"):
            return _behind_sentinels(dsn, limits)
        return _plain(dsn, limits)
    except (ValueError, TypeError) as error:
        reason = f": {error}" if isinstance(error, _Mistake) else ""
        raise ConfigurationError(
            "The Redis DSN is not like redis://user:password@host:6379/0, rediss://..., "
            "unix:///path or redis+sentinel://host:26379,host2:26379/service/0" + reason + "."
        ) from None


class _Mistake(ValueError):
    """What is wrong with a DSN, said without repeating its secrets."""


def _plain(dsn: str, limits: dict[str, Any]) -> Address:
    _check_database(urlsplit(dsn).path if not dsn.startswith("unix:") else "")
    options = {**limits, **parse_url(dsn)}
    kind: type[Connection] = options.pop("connection_class", Connection)
    probe = _made(kind, options)
    where = getattr(probe, "path", None) or f"{probe.host}:{probe.port}"
    return Address(f"Redis at {where}", lambda: lambda: kind(**options))


def _behind_sentinels(dsn: str, limits: dict[str, Any]) -> Address:
    # Not by urlsplit: since 2025 it refuses an IPv6 address behind another host.
    scheme, _, rest = dsn.partition("://")
    rest, _, query = rest.partition("?")
    netloc, _, path = rest.partition("/")
    userinfo, _, hosts = netloc.rpartition("@")
    service, _, database = path.strip("/").partition("/")
    if not service:
        raise _Mistake("the name of the service is missing")
    _check_database(database)
    kind = SSLConnection if scheme.lower() == "rediss+sentinel" else Connection
    # redis-py knows which parameters there are and of what type they are.
    options = parse_url(f"redis://localhost?{query}")
    sentinel_options = {
        name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")
    }
    user, _, password = userinfo.partition(":")
    options = {
        **limits,
        "username": unquote(user) or None,
        "password": unquote(password) or None,
        "db": int(database or 0),
        **{name: value for name, value in options.items() if name != "host"},
    }
    _made(kind, options)
    addresses = [_host_and_port(host) for host in hosts.split(",")]
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")} | {
        "ssl": kind is SSLConnection
    }

    def finder() -> Callable[[], Connection]:
        sentinel = Sentinel(addresses, sentinel_kwargs={**limits, **sentinel_options, **tls})

        def make() -> Connection:
            host, port = sentinel.discover_master(service)
            return kind(**options, host=host, port=port)

        return make

    return Address(f"Redis' {service} of the Sentinels at {hosts}", finder)


def _made(kind: type[Connection], options: dict[str, Any]) -> Connection:
    try:
        return kind(**options)
    except TypeError:
        unknown = ", ".join(sorted(_parameters(options)))
        raise _Mistake(f"one of its parameters is not known ({unknown})") from None


def _parameters(options: dict[str, Any]) -> set[str]:
    return set(options) - {"host", "port", "path", "db", "username", "password"}


def _check_database(path: str) -> None:
    if path.strip("/") and not path.strip("/").isdecimal():
        # redis-py would take database 0 instead.
        raise _Mistake("the database is not a number")


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise _Mistake("the host of a Sentinel is missing")
    return parts.hostname, parts.port or _SENTINEL_PORT
