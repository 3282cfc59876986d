"""PostgreSQL through psycopg 3.

psycopg2 would block all greenlets of a process. libpq waits forever for a server that hangs, so
each wait has a timeout here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

import psycopg
from peewee import InternalError, PeeweeException, PostgresqlDatabase
from psycopg import waiting

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pooled import ErrorKind, PooledConnection
from tuswsgi.connections.sql import Database
from tuswsgi.core.process import is_cooperative

T = TypeVar("T")

#: The number of the advisory lock for creating tables: "tuswsgi" in ASCII.
_TABLES_LOCK = int.from_bytes(b"tuswsgi", "big")

#: Seconds after its own timeouts that the server has to report them.
_GRACE = 1.0

#: Seconds between checks of the deadline while nothing arrives.
_INTERVAL = 0.1

#: https://www.postgresql.org/docs/current/errcodes-appendix.html: classes of errors, or errors.
_KINDS = {
    "08": ErrorKind.BROKEN,  # connection exceptions
    "57P01": ErrorKind.BROKEN,  # the server is shut down, or an administrator ended this
    "57P02": ErrorKind.BROKEN,  # another process of the server crashed
    "57P05": ErrorKind.BROKEN,  # idle for too long
    "25P03": ErrorKind.BROKEN,  # idle in a transaction for too long
    "25P04": ErrorKind.BROKEN,  # a transaction took too long
    "40001": ErrorKind.CONFLICT,  # serialization failure
    "40P01": ErrorKind.CONFLICT,  # deadlock
    "53100": ErrorKind.FULL,
}


class PostgresConnection(PooledConnection):
    """A database of PostgreSQL."""

    kind = "postgres"
    now = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"

    def _database(self, timeout: float) -> Database:
        return cast(Database, _Postgres(self._dsn, timeout))

    def _kind_of(self, error: PeeweeException, database: Database) -> ErrorKind:
        code = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
        found = _KINDS.get(code) or _KINDS.get(code[:2])
        if found is None and cast(_Postgres, database).is_broken():
            return ErrorKind.BROKEN
        return found or ErrorKind.OTHER

    def _exclusively(self, fn: Callable[[Database], T], database: Database) -> T:
        def locked(database: Database) -> T:
            database.execute_sql(f"SELECT pg_advisory_xact_lock({_TABLES_LOCK})")
            return fn(database)

        return self._transact(locked, database)

    def _commit(self, database: Database) -> None:
        # COMMIT undoes a transaction in which a statement failed, without an error.
        if database.execute_sql("COMMIT").statusmessage != "COMMIT":
            raise InternalError("A failed statement was overlooked: the transaction is undone")


class _Postgres(PostgresqlDatabase):
    """A database with one connection, for one greenlet or thread at a time."""

    def __init__(self, dsn: Dsn, timeout: float) -> None:
        super().__init__(dsn.path, thread_safe=False, prefer_psycopg3=True)
        self._dsn = dsn
        self._timeout = timeout

    def is_broken(self) -> bool:
        """Return whether the connection broke."""
        return not self.is_closed() and bool(cast(Any, self).connection().closed)

    def _connect(self) -> _Connection:
        known = {
            # libpq tries several hosts in turn.
            "host": ",".join(host.name for host in self._dsn.hosts) or None,
            "port": ",".join(str(host.port or "") for host in self._dsn.hosts) or None,
            "user": self._dsn.user,
            "password": self._dsn.password,
        }
        parameters: dict[str, Any] = {
            "application_name": "tuswsgi",
            "connect_timeout": math.ceil(self._timeout),
            **{name: value for name, value in known.items() if value is not None},
            **self._dsn.parameters,
            "dbname": self._dsn.path,
            "client_encoding": "utf8",
        }
        connection = _Connection.connect(autocommit=True, **parameters)
        try:
            connection.timeout = self._timeout + _GRACE
            milliseconds = math.ceil(self._timeout * 1000)
            connection.execute(
                "SET default_transaction_isolation = 'read committed';"
                f"SET statement_timeout = {milliseconds};"
                f"SET idle_in_transaction_session_timeout = {milliseconds}"
            )
        except BaseException:
            connection.close()
            raise
        return connection


class _Connection(psycopg.Connection[Any]):
    """A connection with a timeout.

    :ivar timeout: seconds to wait for an answer.
    """

    timeout = math.inf

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        gen = _until(time.monotonic() + self.timeout, gen)
        if is_cooperative():
            # psycopg chooses how to wait when it is imported, maybe before gevent patches.
            return waiting.wait_poll(gen, self.fileno(), _INTERVAL)
        return super().wait(gen, *args, **kwargs)


def _until(deadline: float, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run a generator of psycopg's until a deadline. It yields what it waits for, and receives
    at intervals that nothing is ready.
    """
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() >= deadline:
                raise psycopg.OperationalError("the server does not answer")
            wanted = gen.send(ready)
    except StopIteration as end:
        return cast(T, end.value)
