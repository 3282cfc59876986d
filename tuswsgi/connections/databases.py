"""The SQL databases by their DSNs: everybody who names the same one shares its connections."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

from tuswsgi.connections.address import Address
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.sql import SqlConnection
from tuswsgi.core.errors import ConfigurationError

_connections: WeakValueDictionary[tuple[str, bool], SqlConnection] = WeakValueDictionary()


def connect(dsn: str, *, durable: bool = False, pool: PoolSettings | None = None) -> SqlConnection:
    """Return the connection of `dsn`, the same for everybody who asks. Nothing is opened.

    :param durable: what is committed must survive a power loss; servers see to that by
        themselves.
    :param pool: how many connections to a server there are; whoever asks first decides.
    :raises ConfigurationError: if no such database is supported.
    """
    connection = _connections.get((dsn, durable))
    if connection is None:
        connection = _connections[dsn, durable] = _make(dsn, durable, pool or PoolSettings())
    return connection


def is_server(dsn: str) -> bool:
    """Return whether `dsn` names a server, which several hosts may share."""
    return not dsn.startswith("sqlite:")


def _make(dsn: str, durable: bool, pool: PoolSettings) -> SqlConnection:
    scheme, separator, path = dsn.partition("://")
    if scheme == "sqlite" and path.startswith("/"):
        # Other servers' DSNs ask to create the file, which happens anyway.
        path = path.removeprefix("/").removesuffix("?mode=rwc")
        if path and ":memory:" not in path:
            from tuswsgi.connections.sqlite import SqliteConnection

            return SqliteConnection(Path(path).absolute(), durable=durable)
    if scheme in ("postgres", "postgresql", "mysql"):
        return _make_server(dsn, pool)
    # Never the DSN itself: it may hold a password.
    shown = f"{scheme}://..." if separator else "it"
    raise ConfigurationError(
        f"The database DSN is not supported ({shown}). "
        "Supported: sqlite:///relative/path, sqlite:////absolute/path, "
        "postgres://user:password@host/database and mysql://user:password@host/database."
    )


def _make_server(dsn: str, pool: PoolSettings) -> SqlConnection:
    extra = "mysql" if dsn.startswith("mysql:") else "postgres"
    try:
        if extra == "mysql":
            from tuswsgi.connections.mysql import MysqlConnection

            return MysqlConnection(Address.of(dsn), pool)
        from tuswsgi.connections.postgres import PostgresConnection

        return PostgresConnection(Address.of(dsn), pool)
    except ImportError as error:
        raise ConfigurationError(
            f"The database needs a library that is missing ({error.name}): "
            f"pip install 'tuswsgi[{extra}]'"
        ) from error
