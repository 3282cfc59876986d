"""SQL servers for many greenlets, threads and processes: transactions on pooled connections.

This file owns when a connection is given up, what is tried again, and what a caller gets to
know of a server's trouble. How to connect, and what the errors of a server mean, is the
business of the modules beside it.
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

#: How often a transaction is begun at most that loses against others again and again.
_ATTEMPTS = 10

#: Between attempts of such a transaction.
_BACKOFF = Backoff(first=0.01, longest=0.3, jitter=1.0)

#: Seconds that a change of tables may take.
_MIGRATION_TIMEOUT = 600.0


class Trouble(Enum):
    """What an error of a server means."""

    #: The connection is gone, and what was not committed with it.
    BROKEN = auto()
    #: The transaction was undone in favour of another one.
    CONFLICT = auto()
    #: There is no room left.
    FULL = auto()
    #: Everything else: nobody answers, it takes too long, the statement is wrong.
    OTHER = auto()


#: Pools of all processes that this one descends from. A child must not even close its
#: parent's connections: the server would hear the goodbye.
_opened: set[Pool[Database]] = set()


class PooledConnection(SqlConnection):
    """A database on a server.

    :param settings: how many connections there are; its timeout holds for waiting for one,
        for connecting and for each statement.
    """

    placeholder = "%s"
    for_update = " FOR UPDATE"

    def __init__(self, dsn: Dsn, settings: PoolSettings) -> None:
        self._dsn = dsn
        self._settings = settings
        self._pool: PerProcess[Pool[Database]] = PerProcess(self._make_pool)
        #: Why the server could not be used when it was asked last.
        self._away: str | None = None

    def __str__(self) -> str:
        return str(self._dsn)

    def prepare(self) -> None:
        """There is nothing to do but for the tables."""

    def read(self, fn: Callable[[Database], T]) -> T:
        return self._run(fn)

    def write(self, fn: Callable[[Database], T]) -> T:
        return self._run(partial(self._transact, fn))

    def migrate(self, fn: Callable[[Database], T]) -> T:
        database = self._database(_MIGRATION_TIMEOUT)
        try:
            return self._repeat(partial(self._alone, fn), database, _MIGRATION_TIMEOUT)
        finally:
            database.close()

    def close(self) -> None:
        pool = self._pool.pop()
        if pool is not None:
            pool.close()
            _opened.discard(pool)

    @abstractmethod
    def _database(self, timeout: float) -> Database:
        """Return a database with one connection, which is opened by the first statement.

        :param timeout: seconds for connecting and for each statement.
        """

    @abstractmethod
    def _trouble(self, error: PeeweeException, database: Database) -> Trouble:
        """Return what an error of a statement means."""

    @abstractmethod
    def _alone(self, fn: Callable[[Database], T], database: Database) -> T:
        """Run `fn` while no other process runs another one in this way."""

    def _make_pool(self) -> Pool[Database]:
        make = partial(self._database, self._settings.pool_timeout)
        pool = Pool(self._settings, make, lambda database: database.close())
        _opened.add(pool)
        return pool

    def _run(self, work: Callable[[Database], T]) -> T:
        with self._pool.get().connection() as database:
            return self._repeat(work, database, self._settings.pool_timeout)

    def _repeat(self, work: Callable[[Database], T], database: Database, timeout: float) -> T:
        """Run `work` until it succeeds or there is no use in it any more.

        A connection may have been broken long since: its server was started anew. So that is
        found out and repeated once, and nothing that a server took its time for.
        """
        deadline = time.monotonic() + timeout
        left = {Trouble.BROKEN: 1, Trouble.CONFLICT: _ATTEMPTS - 1}
        pauses = iter(_BACKOFF)
        while True:
            try:
                result = work(database)
                if self._away is not None:
                    self._away = None
                    log.warning("The database %s answers again", self)
                return result
            except PeeweeException as error:
                trouble = self._trouble(error, database)
                if trouble is not Trouble.CONFLICT:
                    database.close()
                left[trouble] = left.get(trouble, 0) - 1
                if left[trouble] < 0 or time.monotonic() >= deadline:
                    raise self._told(error, trouble) from _unexplained(error)
            except Exception:
                raise  # the work's own
            except BaseException:
                # The end of this greenlet, in the middle of a statement.
                database.close()
                raise
            if trouble is Trouble.CONFLICT:
                time.sleep(next(pauses))

    def _transact(self, fn: Callable[[Database], T], database: Database) -> T:
        database.execute_sql("BEGIN")
        try:
            result = fn(database)
        except Exception:
            self._undo(database)
            raise
        try:
            self._commit(database)
        except PeeweeException as error:
            trouble = self._trouble(error, database)
            if trouble is not Trouble.BROKEN:
                raise
            # It may be committed or not: to do it again could be wrong.
            database.close()
            raise self._told(error, trouble) from _unexplained(error)
        return result

    def _commit(self, database: Database) -> None:
        database.execute_sql("COMMIT")

    def _undo(self, database: Database) -> None:
        try:
            database.execute_sql("ROLLBACK")
        except PeeweeException:
            database.close()

    def _told(self, error: PeeweeException, trouble: Trouble) -> TusError:
        text = " ".join(str(error).split())
        # Where it is away, everybody who asks meets the same.
        is_known = text == self._away
        self._away = None if _unexplained(error) else text
        level = logging.DEBUG if is_known else logging.ERROR
        log.log(level, "The database %s failed: %s: %s", self, type(error).__name__, text)
        return StorageFull() if trouble is Trouble.FULL else Unavailable()


def _unexplained(error: PeeweeException) -> PeeweeException | None:
    """Return an error whose traceback somebody will want to see.

    Where a server is away one sentence says it all, and every request meets it.
    """
    return None if isinstance(error, (OperationalError, InterfaceError)) else error
