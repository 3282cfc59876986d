"""Locks in an SQL database that all hosts share.

A lock is a row of ``tuswsgi_locks`` that says until when it is held. All times are those of the
database's clock, so that the clocks of hosts do not matter. A released lock has no row, unless
the next holder must fence off a writer. Waiters set a flag in the row to request the release,
and holders poll for it.
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

#: Seconds between polls for release requests.
_POLL_INTERVAL = 0.25

#: For how many seconds a writer is kept: longer than any host is paused.
_WRITER_TTL = 30 * 24 * 3600

#: How many leases one statement renews.
_BATCH = 500

_LOOK = "SELECT token, ends_at <= {now}, writer FROM tuswsgi_locks WHERE id = ?"
_CREATE = """
INSERT INTO tuswsgi_locks (id, token, writer, worker, ends_at, release_requested)
VALUES (?, ?, ?, ?, {now} + ?, FALSE)
"""
_TAKE_OVER = """
UPDATE tuswsgi_locks SET token = ?, worker = ?, ends_at = {now} + ?, release_requested = FALSE
WHERE id = ? AND token = ? AND writer = ? AND ends_at <= {now}
"""
_SET_WRITER = "UPDATE tuswsgi_locks SET writer = ? WHERE id = ? AND token = ?"
_FREE = "DELETE FROM tuswsgi_locks WHERE id = ? AND token = ? AND writer = token"
_EXPIRE = "UPDATE tuswsgi_locks SET ends_at = {now} WHERE id = ? AND token = ?"
_RENEW = """
UPDATE tuswsgi_locks SET ends_at = {{now}} + ? WHERE worker = ? AND token IN ({tokens})
"""
_HELD = "SELECT token FROM tuswsgi_locks WHERE worker = ?"
_HOLDER = "SELECT token FROM tuswsgi_locks WHERE id = ? AND ends_at > {now}"
_REQUEST = """
UPDATE tuswsgi_locks SET release_requested = TRUE
WHERE id = ? AND token = ? AND NOT release_requested
"""
_REQUESTED = "SELECT token FROM tuswsgi_locks WHERE worker = ? AND release_requested"
_CLEAN_UP = "DELETE FROM tuswsgi_locks WHERE ends_at <= {now} - ?"


class SqlLocker(LeaseLocker):
    """Exclusive locks among all processes that use one database.

    :param locker_dsn: the database, see ``connections.sql.connect``.
    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    :param lock_lease: for how long a lock outlives its holder, in seconds.
    :param host_locker: locks of this host; one is held together with each lease.
    :param pool: the size of the pool of connections, and the timeout of statements.
    :param force_fsync: the same as the info store's, to share its connections; locks do not
        need it.
    """

    # Each attempt is a query, and holders poll for requests.
    backoff = Backoff(first=0.002, longest=0.2)
    request_pause = 0.5

    def __init__(
        self,
        locker_dsn: str,
        lock_timeout: float = 20.0,
        lock_lease: float = 10.0,
        host_locker: Locker[Any] | None = None,
        pool: PoolSettings | None = None,
        *,
        force_fsync: bool = False,
    ) -> None:
        super().__init__(lock_timeout, lock_lease, host_locker)
        self._connection = connect(locker_dsn, force_fsync=force_fsync, pool=pool)

    def prepare(self) -> None:
        super().prepare()
        prepare_tables(self._connection)
        self._change(_CLEAN_UP, _WRITER_TTL)
        # The caller may fork, which connections do not survive.
        self._connection.close()

    def close(self) -> None:
        super().close()
        self._connection.close()

    def _take(self, id: str, token: str) -> str | None:
        # Most attempts find the lock held, and reading is cheap.
        rows = self._rows(_LOOK, id)
        if not rows:
            return token if self._create(id, token) else None
        former, is_expired, writer = rows[0]
        values = (token, worker_of(token), self.lock_lease, id, former, writer)
        return str(writer) if is_expired and self._change(_TAKE_OVER, *values) == 1 else None

    def _create(self, id: str, token: str) -> bool:
        sql = self._text(_CREATE)

        def insert(database: Database) -> None:
            try:
                database.execute_sql(sql, (id, token, token, worker_of(token), self.lock_lease))
            except peewee.IntegrityError:
                raise _Taken from None

        try:
            self._connection.write(insert)
        except _Taken:
            return False
        return True

    def _set_writer(self, id: str, token: str) -> bool:
        return self._change(_SET_WRITER, token, id, token) == 1

    def _free(self, id: str, token: str) -> None:
        if self._change(_FREE, id, token) == 0:
            # It is lost, or a writer still needs fencing: the row stays for the next holder.
            self._change(_EXPIRE, id, token)

    def _renew(self, held: Mapping[str, str]) -> Collection[str]:
        # By token: rows whose release failed belong to this worker, too.
        tokens = iter(held)
        while batch := list(islice(tokens, _BATCH)):
            sql = _RENEW.format(tokens=", ".join("?" * len(batch)))
            self._change(sql, self.lock_lease, worker_of(batch[0]), *batch)
        return {
            token
            for worker in {worker_of(token) for token in held}
            for (token,) in self._rows(_HELD, worker)
        }

    def _holder(self, id: str) -> str | None:
        rows = self._rows(_HOLDER, id)
        return str(rows[0][0]) if rows else None

    def _send_request(self, worker: str, id: str, token: str) -> None:
        self._change(_REQUEST, id, token)

    def _listen(self, worker: str, timeout: float) -> Collection[str]:
        deadline = time.monotonic() + timeout
        while True:
            # Also before the first poll: a holder that has not released yet is asked again.
            time.sleep(min(_POLL_INTERVAL, timeout))
            manager = self._manager.peek()
            if manager is None or manager.worker != worker:
                # The locker was closed: a query would open a connection again.
                return ()
            rows = self._rows(_REQUESTED, worker)
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
    """Another process has just taken the lock."""
