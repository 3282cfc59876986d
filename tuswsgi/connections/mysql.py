"""MySQL and MariaDB, through PyMySQL: how to connect, how long to wait, what errors mean.

The driver is written in Python, so that greenlets go on where it waits for the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import pymysql
from peewee import MySQLDatabase, OperationalError, PeeweeException
from pymysql.constants import CLIENT, CR, ER

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pooled import PooledConnection, Trouble
from tuswsgi.connections.sql import Database
from tuswsgi.core.errors import ConfigurationError

T = TypeVar("T")

#: The name of the lock that who changes tables holds. Such names belong to the whole server.
_TABLES_LOCK = "CONCAT('tuswsgi-', MD5(DATABASE()))"

#: Seconds that somebody else may take to change the tables.
_LOCK_TIMEOUT = 300

#: Seconds that a server has to say itself that something took too long.
_GRACE = 1.0

_TROUBLES = {
    0: Trouble.BROKEN,  # the driver knows that already
    CR.CR_SERVER_GONE_ERROR: Trouble.BROKEN,
    CR.CR_SERVER_LOST: Trouble.BROKEN,
    ER.SERVER_SHUTDOWN: Trouble.BROKEN,
    1927: Trouble.BROKEN,  # MariaDB: an administrator ended this
    4031: Trouble.BROKEN,  # MySQL: idle for too long
    ER.LOCK_DEADLOCK: Trouble.CONFLICT,
    ER.CHECKREAD: Trouble.CONFLICT,
    ER.DISK_FULL: Trouble.FULL,
    ER.RECORD_FILE_FULL: Trouble.FULL,
}

#: What a DSN may say of TLS, by ``ssl-mode``: the driver's words for it.
_TLS: dict[str, dict[str, Any]] = {
    "disabled": {"ssl_disabled": True},
    "preferred": {},
    "required": {"ssl": {"verify_mode": "none"}},
    "verify_ca": {"ssl_verify_cert": True},
    "verify_identity": {"ssl_verify_cert": True, "ssl_verify_identity": True},
}

#: Parameters of a DSN that the driver takes as they are.
_PASSED_ON = {"ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password", "unix_socket"}


class MysqlConnection(PooledConnection):
    """A database of MySQL or MariaDB."""

    kind = "mysql"
    # Not NOW(), which is the time at which a statement began, maybe to wait.
    now = "(UNIX_TIMESTAMP(SYSDATE(6)) + 0e0)"

    def prepare(self) -> None:
        _parameters(self._dsn)

    def _database(self, timeout: float) -> Database:
        return cast(Database, _Mysql(self._dsn, timeout))

    def _trouble(self, error: PeeweeException, database: Database) -> Trouble:
        code: Any = error.args[0] if error.args else None
        return _TROUBLES.get(code, Trouble.OTHER)

    def _alone(self, fn: Callable[[Database], T], database: Database) -> T:
        # No transaction: each change of a table would end it.
        (locked,) = database.execute_sql(
            f"SELECT GET_LOCK({_TABLES_LOCK}, {_LOCK_TIMEOUT})"
        ).fetchone()
        if not locked:
            raise OperationalError(f"Others change the tables for more than {_LOCK_TIMEOUT} s")
        try:
            return fn(database)
        finally:
            database.close()


class _Mysql(MySQLDatabase):
    """A database with one connection, for one user at a time."""

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
                # How many rows an UPDATE found, also where it changed nothing.
                client_flag=CLIENT.FOUND_ROWS,
                connect_timeout=max(self._timeout, 1.0),
                read_timeout=self._timeout + _GRACE,
                write_timeout=self._timeout + _GRACE,
            )
        except RuntimeError as error:
            # A way to log in for which the driver lacks a library.
            raise OperationalError(str(error)) from error
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
                # The zone is for the clock, which would stand still for an hour each year.
                cursor.execute(
                    "SET SESSION time_zone = '+00:00', "
                    f"innodb_lock_wait_timeout = {max(math.floor(self._timeout), 1)}"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _parameters(dsn: Dsn) -> dict[str, Any]:
    """Return what the parameters of a DSN are for the driver.

    :raises ConfigurationError: if it does not know one of them.
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
