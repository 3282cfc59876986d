"""SQL databases by DSN: callers that pass the same DSN share its connections."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.sql import SqlConnection
from tuswsgi.core.errors import ConfigurationError

_connections: WeakValueDictionary[tuple[str, bool], SqlConnection] = WeakValueDictionary()


def connect(
    dsn: str, *, force_fsync: bool = False, pool: PoolSettings | None = None
) -> SqlConnection:
    """Return the shared connection for `dsn`. Nothing is opened yet.

    :param force_fsync: SQLite syncs every commit to the disk, so that it survives a power
        failure. Servers do so on their own.
    :param pool: the size of a server's pool; the first caller decides.
    :raises ConfigurationError: if no such database is supported.
    """
    connection = _connections.get((dsn, force_fsync))
    if connection is None:
        connection = _make(dsn, force_fsync, pool or PoolSettings())
        _connections[dsn, force_fsync] = connection
    return connection


def is_server(dsn: str) -> bool:
    """Return whether `dsn` names a database server, which several hosts can share."""
    return not dsn.startswith("sqlite:")


def _make(dsn: str, force_fsync: bool, pool: PoolSettings) -> SqlConnection:
    scheme, separator, path = dsn.partition("://")
    if scheme == "sqlite" and path.startswith("/"):
        # rustus' DSNs ask to create the file, which happens anyway.
        path = path.removeprefix("/").removesuffix("?mode=rwc")
        if path and ":memory:" not in path:
            from tuswsgi.connections.sqlite import SqliteConnection

            return SqliteConnection(Path(path).absolute(), force_fsync=force_fsync)
    if scheme in ("postgres", "postgresql", "mysql"):
        return _make_server(dsn, pool)
    # Never show the DSN itself: it may contain a password.
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

            return MysqlConnection(_parsed(dsn), pool)
        from tuswsgi.connections.postgres import PostgresConnection

        return PostgresConnection(_parsed(dsn), pool)
    except ImportError as error:
        raise ConfigurationError(
            f"The database needs a library that is missing ({error.name}): "
            f"pip install 'tuswsgi-server[{extra}]'"
        ) from error


def _parsed(dsn: str) -> Dsn:
    try:
        parsed = Dsn.parse(dsn)
        if not parsed.path:
            raise ValueError("no database")
        if len(parsed.hosts) > 1 and parsed.scheme == "mysql":
            raise ValueError("several hosts")
        return parsed
    except ValueError:
        raise ConfigurationError(
            "The database DSN is not like scheme://user:password@host:port/database. "
            "Special characters of the user and the password must be percent-encoded."
        ) from None
