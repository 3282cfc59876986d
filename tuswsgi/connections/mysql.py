"""MySQL and MariaDB through PyMySQL, which is written in Python and so does not block greenlets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import pymysql
from peewee import MySQLDatabase, OperationalError, PeeweeException
from pymysql.constants import CLIENT, CR, ER

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pooled import ErrorKind, PooledConnection
from tuswsgi.connections.sql import Database
from tuswsgi.core.errors import ConfigurationError

T = TypeVar("T")

#: The name of the lock for creating tables. Such names are shared by all databases of a server.
_TABLES_LOCK = "CONCAT('tuswsgi-', MD5(DATABASE()))"

#: Seconds to wait while another process creates the tables.
_LOCK_TIMEOUT = 300

#: Seconds after its own timeouts that the server has to report them.
_GRACE = 1.0

_KINDS = {
    0: ErrorKind.BROKEN,  # PyMySQL: the connection was closed before
    CR.CR_SERVER_GONE_ERROR: ErrorKind.BROKEN,
    CR.CR_SERVER_LOST: ErrorKind.BROKEN,
    ER.SERVER_SHUTDOWN: ErrorKind.BROKEN,
    1927: ErrorKind.BROKEN,  # MariaDB: an administrator ended this
    4031: ErrorKind.BROKEN,  # MySQL: idle for too long
    ER.LOCK_DEADLOCK: ErrorKind.CONFLICT,
    ER.CHECKREAD: ErrorKind.CONFLICT,
    ER.DISK_FULL: ErrorKind.FULL,
    ER.RECORD_FILE_FULL: ErrorKind.FULL,
}

#: The values of ``ssl-mode`` in a DSN, and PyMySQL's parameters for them.
_TLS: dict[str, dict[str, Any]] = {
    "disabled": {"ssl_disabled": True},
    "preferred": {},
    "required": {"ssl": {"verify_mode": "none"}},
    "verify_ca": {"ssl_verify_cert": True},
    "verify_identity": {"ssl_verify_cert": True, "ssl_verify_identity": True},
}

#: Parameters of a DSN that PyMySQL takes as they are.
_PASSED_ON = {"ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password", "unix_socket"}


class MysqlConnection(PooledConnection):
    """A database of MySQL or MariaDB."""

    kind = "mysql"
    # Not NOW(), which is when the statement began, maybe to wait for a lock.
    now = "(UNIX_TIMESTAMP(SYSDATE(6)) + 0e0)"

    def prepare(self) -> None:
        _parameters(self._dsn)

    def _database(self, timeout: float) -> Database:
        return cast(Database, _Mysql(self._dsn, timeout))

    def _kind_of(self, error: PeeweeException, database: Database) -> ErrorKind:
        code: Any = error.args[0] if error.args else None
        return _KINDS.get(code, ErrorKind.OTHER)

    def _exclusively(self, fn: Callable[[Database], T], database: Database) -> T:
        # Not in a transaction: each CREATE TABLE would commit it.
        (locked,) = database.execute_sql(
            f"SELECT GET_LOCK({_TABLES_LOCK}, {_LOCK_TIMEOUT})"
        ).fetchone()
        if not locked:
            raise OperationalError(
                f"Another process has been creating tables for more than {_LOCK_TIMEOUT} s"
            )
        try:
            return fn(database)
        finally:
            database.close()


class _Mysql(MySQLDatabase):
    """A database with one connection, for one greenlet or thread at a time."""

    def __init__(self, dsn: Dsn, timeout: float) -> None:
        super().__init__(dsn.path, thread_safe=False)
        self._timeout = timeout
        self._known: dict[str, Any] = {
            "host": dsn.hosts[0].name if dsn.hosts else None,
            "port": (dsn.hosts[0].port if dsn.hosts else None) or 3306,
            "user": dsn.user,
            # The driver encodes a string as Latin-1.
            "password": (dsn.password or "").encode(),
            "database": dsn.path,
            **_parameters(dsn),
        }

    def _connect(self) -> pymysql.Connection[Any]:
        try:
            connection = pymysql.connect(
                **self._known,
                autocommit=True,
                charset="utf8mb4",
                sql_mode="STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION",
                # UPDATE returns how many rows it found, including unchanged ones.
                client_flag=CLIENT.FOUND_ROWS,
                connect_timeout=max(self._timeout, 1.0),
                read_timeout=self._timeout + _GRACE,
                write_timeout=self._timeout + _GRACE,
            )
        except RuntimeError as error:
            # The server wants an authentication method for which a library is missing.
            raise OperationalError(str(error)) from error
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                # In a zone with summer time the clock would repeat an hour each year.
                cursor.execute(
                    "SET SESSION time_zone = '+00:00', "
                    f"innodb_lock_wait_timeout = {max(math.floor(self._timeout), 1)}"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _parameters(dsn: Dsn) -> dict[str, Any]:
    """Return PyMySQL's parameters for those of a DSN.

    :raises ConfigurationError: if one is not supported.
    """
    parameters: dict[str, Any] = {}
    for given, value in dsn.parameters.items():
        name = given.replace("-", "_").lower()
        mode = value.lower().replace("-", "_")
        if name in {"ssl_mode", "sslmode"} and mode in _TLS:
            parameters.update(_TLS[mode])
        elif name in _PASSED_ON:
            parameters[name] = value
        elif name not in {"charset", "collation"}:  # ours to choose
            raise ConfigurationError(
                f"The database DSN has a parameter that is not supported: {given}. Supported: "
                f"ssl-mode ({', '.join(_TLS)}), {', '.join(sorted(_PASSED_ON))}."
            )
    return parameters
