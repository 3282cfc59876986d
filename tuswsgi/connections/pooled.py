"""Database servers: transactions on pooled connections, repeated where that is safe.

Subclasses connect to a kind of server and classify its errors.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TypeVar

from peewee import InterfaceError, OperationalError, PeeweeException

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pool import Pool, PoolSettings
from tuswsgi.connections.sql import Database, SqlConnection
from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import StorageFull, TusError, Unavailable
from tuswsgi.core.process import PerProcess

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How many times to attempt a transaction that the server rolls back because of a conflict.
_ATTEMPTS = 10

#: The pauses between these attempts.
_BACKOFF = Backoff(first=0.01, longest=0.3, jitter=1.0)

#: Seconds that creating the tables may take.
_MIGRATION_TIMEOUT = 600.0


class ErrorKind(Enum):
    """What an error of a server means."""

    #: The connection is broken; what was not committed is undone.
    BROKEN = auto()
    #: The transaction was undone in favour of another one.
    CONFLICT = auto()
    #: The disk is full.
    FULL = auto()
    #: Everything else: the server is down or too slow, the statement is wrong.
    OTHER = auto()


#: The pools of this process and of its ancestors. They are kept here because a child must not
#: close its parent's connections, not even by garbage collection: the server would end them.
_opened: set[Pool[Database]] = set()


class PooledConnection(SqlConnection):
    """A database on a server.

    :param settings: the size of the pool, and the timeout for waiting for a connection, for
        connecting and for each statement.
    """

    placeholder = "%s"
    for_update = " FOR UPDATE"

    def __init__(self, dsn: Dsn, settings: PoolSettings) -> None:
        self._dsn = dsn
        self._settings = settings
        self._pool: PerProcess[Pool[Database]] = PerProcess(self._make_pool)
        #: The message of the last failure, until a statement succeeds.
        self._failure: str | None = None

    def __str__(self) -> str:
        return str(self._dsn)

    def prepare(self) -> None:
        """A server needs nothing but the tables."""

    def read(self, fn: Callable[[Database], T]) -> T:
        return self._run(fn)

    def write(self, fn: Callable[[Database], T]) -> T:
        return self._run(partial(self._transact, fn))

    def migrate(self, fn: Callable[[Database], T]) -> T:
        database = self._database(_MIGRATION_TIMEOUT)
        try:
            return self._repeat(partial(self._exclusively, fn), database, _MIGRATION_TIMEOUT)
        finally:
            database.close()

    def close(self) -> None:
        pool = self._pool.pop()
        if pool is not None:
            pool.close()
            _opened.discard(pool)

    @abstractmethod
    def _database(self, timeout: float) -> Database:
        """Return a database with one connection, which the first statement opens.

        :param timeout: seconds for connecting and for each statement.
        """

    @abstractmethod
    def _kind_of(self, error: PeeweeException, database: Database) -> ErrorKind:
        """Classify an error."""

    @abstractmethod
    def _exclusively(self, fn: Callable[[Database], T], database: Database) -> T:
        """Run `fn` under a lock among all processes."""

    def _make_pool(self) -> Pool[Database]:
        make = partial(self._database, self._settings.pool_timeout)
        pool = Pool(self._settings, make, lambda database: database.close())
        _opened.add(pool)
        return pool

    def _run(self, work: Callable[[Database], T]) -> T:
        with self._pool.get().connection() as database:
            return self._repeat(work, database, self._settings.pool_timeout)

    def _repeat(self, work: Callable[[Database], T], database: Database, timeout: float) -> T:
        """Run `work`, and again after a conflict, and once after the connection broke.

        An idle connection may have broken long ago, because the server restarted.
        """
        deadline = time.monotonic() + timeout
        retries = {ErrorKind.BROKEN: 1, ErrorKind.CONFLICT: _ATTEMPTS - 1}
        pauses = iter(_BACKOFF)
        while True:
            try:
                result = work(database)
                if self._failure is not None:
                    self._failure = None
                    log.warning("The database %s answers again", self)
                return result
            except PeeweeException as error:
                kind = self._kind_of(error, database)
                if kind is not ErrorKind.CONFLICT:
                    database.close()
                retries[kind] = retries.get(kind, 0) - 1
                if retries[kind] < 0 or time.monotonic() >= deadline:
                    raise self._tus_error(error, kind) from _unexpected(error)
            except Exception:
                raise  # of `work` itself
            except BaseException:
                # This greenlet was killed in the middle of a statement.
                database.close()
                raise
            if kind is ErrorKind.CONFLICT:
                time.sleep(next(pauses))

    def _transact(self, fn: Callable[[Database], T], database: Database) -> T:
        database.execute_sql("BEGIN")
        try:
            result = fn(database)
        except Exception:
            self._roll_back(database)
            raise
        try:
            self._commit(database)
        except PeeweeException as error:
            kind = self._kind_of(error, database)
            if kind is not ErrorKind.BROKEN:
                raise
            # It may have been committed, so it must not be repeated.
            database.close()
            raise self._tus_error(error, kind) from _unexpected(error)
        return result

    def _commit(self, database: Database) -> None:
        database.execute_sql("COMMIT")

    def _roll_back(self, database: Database) -> None:
        try:
            database.execute_sql("ROLLBACK")
        except PeeweeException:
            database.close()

    def _tus_error(self, error: PeeweeException, kind: ErrorKind) -> TusError:
        text = " ".join(str(error).split())
        # Every request fails alike while the server is down: one line is enough.
        is_known = text == self._failure
        self._failure = None if _unexpected(error) else text
        level = logging.DEBUG if is_known else logging.ERROR
        log.log(level, "The database %s failed: %s: %s", self, type(error).__name__, text)
        return StorageFull() if kind is ErrorKind.FULL else Unavailable()


def _unexpected(error: PeeweeException) -> PeeweeException | None:
    """Return the error if its traceback is useful; ``None`` if the server is merely down."""
    return None if isinstance(error, (OperationalError, InterfaceError)) else error
