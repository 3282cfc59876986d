"""Locks in an SQL database, for all hosts that share one and want no other server.

A lock is a row of ``tuswsgi_locks`` that says until when it is held, by the database's own
clock: no host's clock matters. A row is removed when the lock is given back. One that a holder
has left behind is its mark: it is taken over, or removed when a process starts much later. A
database cannot call anybody, so that who waits writes so into the row, and holders look for
that a few times a second.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import peewee

from tuswsgi.connections.databases import connect
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.sql import Database
from tuswsgi.connections.tables import prepare_tables
from tuswsgi.core.backoff import Backoff
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.lease import LeaseLocker, worker_of

#: Seconds between two looks for who waits.
_HEARING_PAUSE = 0.25

#: For how many seconds a row outlives its lease: longer than any host stands still.
_MARKED = 30 * 24 * 3600

#: How many leases one statement prolongs.
_MANY = 500

_LOOK = "SELECT token, ends_at <= {now}, mark FROM tuswsgi_locks WHERE id = ?"
_CREATE = """
INSERT INTO tuswsgi_locks (id, token, mark, worker, ends_at, asked)
VALUES (?, ?, ?, ?, {now} + ?, FALSE)
"""
_TAKE_OVER = """
UPDATE tuswsgi_locks SET token = ?, worker = ?, ends_at = {now} + ?, asked = FALSE
WHERE id = ? AND token = ? AND mark = ? AND ends_at <= {now}
"""
_SETTLE = "UPDATE tuswsgi_locks SET mark = ? WHERE id = ? AND token = ?"
_GIVE_BACK = "DELETE FROM tuswsgi_locks WHERE id = ? AND token = ? AND mark = token"
_LEAVE = "UPDATE tuswsgi_locks SET ends_at = {now} WHERE id = ? AND token = ?"
_PROLONG = """
UPDATE tuswsgi_locks SET ends_at = {{now}} + ? WHERE worker = ? AND token IN ({tokens})
"""
_HELD = "SELECT token FROM tuswsgi_locks WHERE worker = ?"
_HOLDER = "SELECT token FROM tuswsgi_locks WHERE id = ? AND ends_at > {now}"
_ASK = "UPDATE tuswsgi_locks SET asked = TRUE WHERE id = ? AND token = ? AND NOT asked"
_HEAR = "SELECT token FROM tuswsgi_locks WHERE worker = ? AND asked"
_CLEAN_UP = "DELETE FROM tuswsgi_locks WHERE ends_at <= {now} - ?"


class SqlLocker(LeaseLocker):
    """Exclusive locks among all processes that use one database.

    :param dsn: the database, see ``connections.sql.connect``.
    :param timeout: how long ``lock`` waits for a holder, in seconds.
    :param lease: for how long a lock outlives its holder, in seconds.
    :param beside: locks of this host, each of which is held for as long as the lease.
    :param pool: how many connections there are, and how long the database may take.
    :param force_fsync: as the info store has it that shares the connections; locks need it not.
    """

    # Each attempt is a query, and a holder elsewhere looks for requests now and then only.
    backoff = Backoff(first=0.002, longest=0.2)
    request_pause = 0.5

    def __init__(
        self,
        dsn: str,
        timeout: float = 20.0,
        lease: float = 10.0,
        beside: Locker[Any] | None = None,
        pool: PoolSettings | None = None,
        *,
        force_fsync: bool = False,
    ) -> None:
        super().__init__(timeout, lease, beside)
        self._connection = connect(dsn, force_fsync=force_fsync, pool=pool)

    def prepare(self) -> None:
        super().prepare()
        prepare_tables(self._connection)
        self._change(_CLEAN_UP, _MARKED)
        # Whoever prepares may fork then.
        self._connection.close()

    def close(self) -> None:
        super().close()
        self._connection.close()

    def _take(self, id: str, token: str) -> str | None:
        # Most attempts find a lock that is held, and reading disturbs nobody.
        rows = self._rows(_LOOK, id)
        if not rows:
            return token if self._create(id, token) else None
        former, is_over, mark = rows[0]
        values = (token, worker_of(token), self.lease, id, former, mark)
        return str(mark) if is_over and self._change(_TAKE_OVER, *values) == 1 else None

    def _create(self, id: str, token: str) -> bool:
        sql = self._text(_CREATE)

        def insert(database: Database) -> None:
            try:
                database.execute_sql(sql, (id, token, token, worker_of(token), self.lease))
            except peewee.IntegrityError:
                raise _Taken from None

        try:
            self._connection.write(insert)
        except _Taken:
            return False
        return True

    def _settle(self, id: str, token: str) -> bool:
        return self._change(_SETTLE, token, id, token) == 1

    def _give_back(self, id: str, token: str) -> None:
        if self._change(_GIVE_BACK, id, token) == 0:
            # It is lost, or contested: then the next one has to know that, too.
            self._change(_LEAVE, id, token)

    def _prolong(self, held: Mapping[str, str]) -> Collection[str]:
        # By their tokens: a row whose release failed is this worker's as well.
        tokens = iter(held)
        while some := list(islice(tokens, _MANY)):
            sql = _PROLONG.format(tokens=", ".join("?" * len(some)))
            self._change(sql, self.lease, worker_of(some[0]), *some)
        return {
            token
            for worker in {worker_of(token) for token in held}
            for (token,) in self._rows(_HELD, worker)
        }

    def _holder(self, id: str) -> str | None:
        rows = self._rows(_HOLDER, id)
        return str(rows[0][0]) if rows else None

    def _ask(self, worker: str, id: str, token: str) -> None:
        self._change(_ASK, id, token)

    def _hear(self, worker: str, timeout: float) -> Collection[str]:
        deadline = time.monotonic() + timeout
        while True:
            # First of all: who is asked and does not let go is asked again by and by.
            time.sleep(min(_HEARING_PAUSE, timeout))
            keeper = self._keeper.peek()
            if keeper is None or keeper.worker != worker:
                # Closed meanwhile: a look would open connections that nobody closes.
                return ()
            rows = self._rows(_HEAR, worker)
            if rows or time.monotonic() >= deadline:
                return [token for (token,) in rows]

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        text = self._text(sql)
        return self._connection.read(
            lambda database: list(database.execute_sql(text, values).fetchall())
        )

    def _change(self, sql: str, *values: object) -> int:
        """Run a statement and return how many rows it has changed."""
        text = self._text(sql)
        return self._connection.write(
            lambda database: int(database.execute_sql(text, values).rowcount)
        )

    def _text(self, sql: str) -> str:
        return self._connection.statement(sql.format(now=self._connection.now))


class _Taken(Exception):
    """Another process was faster."""
