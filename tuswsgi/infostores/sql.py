"""Records of uploads in an SQL database, through peewee.

This file owns the statements; the tables are those of ``connections.tables``, connections and
transactions those of ``connections.sql``. Statements that run on every request are written as
text, since building them anew takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peewee

from tuswsgi.connections.databases import connect
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.sql import Database
from tuswsgi.connections.tables import prepare_tables
from tuswsgi.core.errors import InfoConflict, UploadExists, UploadNotFound
from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import FileInfo, State
from tuswsgi.core.process import let_others_run
from tuswsgi.infostores import record
from tuswsgi.infostores.base import Census, InfoStore

_CREATE = """
INSERT INTO tuswsgi_uploads
(id, state, sequence, created_at, expires_at, finished_at, deleted_at, promised, record)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_EXISTS = "SELECT 1 FROM tuswsgi_uploads WHERE id = ?"
_LOAD = "SELECT record FROM tuswsgi_uploads WHERE id = ?"
_SAVE = """
UPDATE tuswsgi_uploads
SET state = ?, sequence = ?, expires_at = ?, finished_at = ?, deleted_at = ?, promised = ?,
record = ?
WHERE id = ? AND sequence = ?
"""
_FORGET = """
DELETE FROM tuswsgi_uploads
WHERE id = ? AND sequence = ? AND deleted_at IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM tuswsgi_events WHERE upload = ?)
"""
# The sum of two large uploads may be more than a column holds: it is made of two sums.
_USAGE = """
SELECT SUM(promised >> 32), SUM(promised & 4294967295) FROM tuswsgi_uploads
"""
_EXPIRED = """
SELECT id FROM tuswsgi_uploads WHERE expires_at <= ? ORDER BY expires_at LIMIT ?
"""
_EVENT = """
event_id, type, upload, sequence, created_at, transport, payload, due_at, attempts, error, dead
"""
_ADD_EVENT = f"""
INSERT INTO tuswsgi_events ({_EVENT}, claimed_until) VALUES ({", ".join("?" * 11)}, 0)
"""
_EVENTS = f"""
SELECT {_EVENT} FROM tuswsgi_events
WHERE upload = ? AND NOT dead ORDER BY sequence, number
"""
_DEAD_EVENTS = f"""
SELECT {_EVENT} FROM tuswsgi_events
WHERE upload = ? AND dead ORDER BY sequence, number
"""
_OUTBOX = f"SELECT {_EVENT} FROM tuswsgi_events WHERE dead = ? ORDER BY number LIMIT ?"
_CLAIM = """
UPDATE tuswsgi_events SET claimed_by = ?, claimed_until = ?, free_at = ?
WHERE number = ? AND free_at = ?
"""
_RENEW = """
UPDATE tuswsgi_events
SET claimed_until = ?, free_at = CASE WHEN free_at IS NULL THEN NULL ELSE ? END
WHERE claimed_by = ?
"""
_SETTLE = "DELETE FROM tuswsgi_events WHERE event_id = ? AND transport = ?"
_PUT_BACK = """
UPDATE tuswsgi_events
SET due_at = ?, attempts = ?, error = ?, dead = ?,
claimed_by = NULL, claimed_until = 0, free_at = NULL
WHERE event_id = ? AND transport = ?
"""
_FIRST = """
SELECT number, due_at, claimed_until, free_at FROM tuswsgi_events
WHERE upload = ? AND transport = ? AND NOT dead ORDER BY sequence, number LIMIT 1
"""
_FREE = "UPDATE tuswsgi_events SET free_at = ? WHERE number = ? AND free_at IS NULL"
_FREE_NO_MORE = """
UPDATE tuswsgi_events SET free_at = NULL
WHERE upload = ? AND transport = ? AND number <> ? AND free_at IS NOT NULL
"""
_COUNT_STATES = "SELECT COUNT(*) FROM tuswsgi_uploads WHERE state IN (?, ?)"
#: In pages, since SQLite blocks the process for as long as a statement runs.
_COUNT_STALLED = """
SELECT MAX(id), SUM(CASE WHEN {last} <= ? THEN 1 ELSE 0 END) FROM (
    SELECT id, created_at, record FROM tuswsgi_uploads
    WHERE state = ? AND id > ? ORDER BY id LIMIT 2000
) AS page
"""
#: When the last byte came, of which only the record tells.
_LAST_BYTE = {
    "sqlite": "COALESCE(json_extract(record, '$.last_byte_at'), created_at)",
    "postgres": "COALESCE(CAST(CAST(record AS json)->>'last_byte_at' AS float8), created_at)",
    "mysql": "COALESCE(JSON_VALUE(record, '$.last_byte_at') + 0.0, created_at)",
}
_COUNT_EVENTS = "SELECT COUNT(*) FROM tuswsgi_events WHERE dead = ?"
_OLDEST = "SELECT created_at FROM tuswsgi_events WHERE dead = ? ORDER BY number LIMIT 1"
_WAIT = "INSERT INTO tuswsgi_waiting (part, final) VALUES (?, ?)"
_WAIT_NO_MORE = "DELETE FROM tuswsgi_waiting WHERE final = ?"
_WAITING_FOR = "SELECT final FROM tuswsgi_waiting WHERE part = ? ORDER BY final"


@dataclass(repr=False, eq=False)
class SqlInfoStore(InfoStore):
    """Records in a database that all workers share.

    :param info_db_dsn: the database, see ``connections.sql.connect``.
    :param force_fsync: what is committed must survive a power loss.
    """

    info_db_dsn: str
    force_fsync: bool = False
    pool: PoolSettings = PoolSettings()

    def __post_init__(self) -> None:
        self._connection = connect(self.info_db_dsn, force_fsync=self.force_fsync, pool=self.pool)
        text = self._connection.statement
        self._create = text(_CREATE)
        self._exists = text(_EXISTS)
        self._load = text(_LOAD)
        self._save = text(_SAVE)
        self._expired = text(_EXPIRED)
        self._forget = text(_FORGET)
        self._add_event, self._events, self._outbox = map(text, (_ADD_EVENT, _EVENTS, _OUTBOX))
        self._dead_events = text(_DEAD_EVENTS)
        self._usage = text(_USAGE)
        self._claim = text(_CLAIM)
        self._renew = text(_RENEW)
        self._settle = text(_SETTLE)
        self._put_back = text(_PUT_BACK)
        self._first = text(_FIRST)
        self._free = text(_FREE)
        self._free_no_more = text(_FREE_NO_MORE)
        self._lock = text(_EXISTS) + self._connection.for_update
        self._wait = text(_WAIT)
        self._wait_no_more = text(_WAIT_NO_MORE)
        self._waiting_for = text(_WAITING_FOR)
        self._count_states = text(_COUNT_STATES)
        self._count_events = text(_COUNT_EVENTS)
        self._count_stalled = text(_COUNT_STALLED.format(last=_LAST_BYTE[self._connection.kind]))
        self._oldest = text(_OLDEST)

    def prepare(self) -> None:
        prepare_tables(self._connection)

    def close(self) -> None:
        self._connection.close()

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        self._connection.write(partial(self._run_create, info, events))

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        saved = info.replace(sequence=info.sequence + 1)
        self._connection.write(partial(self._run_save, saved, events))
        return saved

    def forget(self, info: FileInfo) -> bool:
        values = (info.id, info.sequence, info.id)
        return self._connection.write(
            lambda database: bool(database.execute_sql(self._forget, values).rowcount)
        )

    def load(self, id: str) -> FileInfo:
        row = self._one(self._load, (id,))
        if row is None:
            raise UploadNotFound
        return record.load(record.decode(row[0]))

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        wanted = [state.value for state in State if states is None or state in states]
        if not wanted:
            return []  # servers refuse an empty list
        marks = ", ".join("?" * len(wanted))
        sql = self._connection.statement(
            "SELECT record FROM tuswsgi_uploads "
            f"WHERE state IN ({marks}) AND id > ? ORDER BY id LIMIT ?"
        )
        rows = self._all(sql, (*wanted, after, limit))
        return [record.load(record.decode(row[0])) for row in rows]

    def usage(self) -> int:
        high, low = self._one(self._usage, ())
        return (int(high or 0) << 32) + int(low or 0)

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        return [row[0] for row in self._all(self._expired, (now, limit))]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        return [row[0] for row in self._all(self._waiting_for, (part,))]

    def census(self, stalled_before: float) -> Census:
        states = (State.RECEIVING.value, State.WAITING.value)
        stalled = 0
        after = ""
        while after is not None:
            values = (stalled_before, State.RECEIVING.value, after)
            after, found = self._one(self._count_stalled, values)
            stalled += int(found or 0)
            let_others_run()
        oldest = self._one(self._oldest, (False,))
        return Census(
            self._one(self._count_states, states)[0],
            stalled,
            self._one(self._count_events, (False,))[0],
            self._one(self._count_events, (True,))[0],
            None if oldest is None else oldest[0],
        )

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        events = self._dead_events if dead else self._events
        return [_event(row) for row in self._all(events, (id,))]

    def claim(
        self,
        worker: str,
        now: float,
        until: float,
        *,
        upload: str | None = None,
        transport: str | None = None,
        limit: int = 100,
    ) -> Sequence[Event]:
        wanted = {"free_at <= ?": now, "upload = ?": upload, "transport = ?": transport}
        wanted = {term: value for term, value in wanted.items() if value is not None}
        text = f"FROM tuswsgi_events WHERE {' AND '.join(wanted)}"
        look = self._connection.statement(f"SELECT 1 {text} LIMIT 1")
        # Looking takes no lock: an empty outbox is in nobody's way.
        if self._one(look, (*wanted.values(),)) is None:
            return []
        find = self._connection.statement(
            f"SELECT {_EVENT}, number, free_at {text} ORDER BY free_at, number LIMIT ?"
        )
        values = (*wanted.values(), limit)
        return self._connection.write(partial(self._run_claim, find, values, worker, until))

    def renew(self, worker: str, until: float) -> None:
        self._connection.write(
            lambda database: database.execute_sql(self._renew, (until, until, worker)).rowcount
        )

    def settle(self, event: Event) -> None:
        values = (event.id, event.transport)
        self._connection.write(partial(self._change, event, self._settle, values))

    def put_back(self, event: Event) -> None:
        changes = (event.due_at, event.attempts, _text(event.error), event.dead)
        values = (*changes, event.id, event.transport)
        self._connection.write(partial(self._change, event, self._put_back, values))

    def outbox(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        return [_event(row) for row in self._all(self._outbox, (dead, limit))]

    def _run_create(self, info: FileInfo, events: Sequence[Event], database: Database) -> None:
        try:
            database.execute_sql(
                self._create,
                (info.id, info.state.value, info.sequence, info.created_at, *_searched(info)),
            )
        except peewee.IntegrityError:
            raise UploadExists from None
        self._add(info, events, database)

    def _run_save(self, saved: FileInfo, events: Sequence[Event], database: Database) -> None:
        cursor = database.execute_sql(
            self._save,
            (saved.state.value, saved.sequence, *_searched(saved), saved.id, saved.sequence - 1),
        )
        if cursor.rowcount == 0:
            found = database.execute_sql(self._exists, (saved.id,)).fetchone()
            raise InfoConflict if found else UploadNotFound
        if saved.is_final:
            database.execute_sql(self._wait_no_more, (saved.id,))
        self._add(saved, events, database)

    def _add(self, info: FileInfo, events: Sequence[Event], database: Database) -> None:
        if info.state is State.WAITING:
            for part in dict.fromkeys(info.partial_uploads):
                database.execute_sql(self._wait, (part, info.id))
        for event in events:
            database.execute_sql(self._add_event, _row(event))
            self._free_first(event.upload, event.transport, database)

    def _run_claim(
        self, find: str, values: tuple[Any, ...], worker: str, until: float, database: Database
    ) -> Sequence[Event]:
        claimed = []
        for *row, number, free_at in database.execute_sql(find, values).fetchall():
            claim = (worker, until, until, number, free_at)
            # Where writers do not exclude each other, another one may have been faster.
            if database.execute_sql(self._claim, claim).rowcount:
                claimed.append(_event(row))
        return claimed

    def _change(self, event: Event, sql: str, values: tuple[Any, ...], database: Database) -> None:
        # A new event must not be written at the same time: it would take this one for its
        # predecessor, and nobody would tell it that it is the first.
        database.execute_sql(self._lock, (event.upload,)).fetchone()
        database.execute_sql(sql, values)
        self._free_first(event.upload, event.transport, database)

    def _free_first(self, upload: str, transport: str, database: Database) -> None:
        """Let the first event be claimed, and no other one."""
        row = database.execute_sql(self._first, (upload, transport)).fetchone()
        if row is None:
            return
        number, due_at, claimed_until, free_at = row
        if free_at is None:
            database.execute_sql(self._free_no_more, (upload, transport, number))
            database.execute_sql(self._free, (max(due_at, claimed_until), number))

    def _one(self, sql: str, values: tuple[Any, ...]) -> Any:
        return self._connection.read(lambda database: database.execute_sql(sql, values).fetchone())

    def _all(self, sql: str, values: tuple[Any, ...]) -> Any:
        return self._connection.read(lambda database: database.execute_sql(sql, values).fetchall())


def _searched(info: FileInfo) -> tuple[Any, ...]:
    unfinished = info.finished_at is None and info.deleted_at is None
    return (
        info.expires_at if unfinished else None,
        info.finished_at,
        info.deleted_at,
        info.promised,
        record.encode(record.dump(info)),
    )


def _row(event: Event) -> tuple[Any, ...]:
    return (
        event.id,
        event.type.value,
        event.upload,
        event.sequence,
        event.created_at,
        event.transport,
        record.encode(event.payload),
        event.due_at,
        event.attempts,
        _text(event.error),
        event.dead,
    )


def _text(text: str | None) -> str | None:
    """Return a text without what not every database takes."""
    return text and text.encode("utf-8", "replace").decode().replace("\0", "?")


def _event(row: Sequence[Any]) -> Event:
    id, type, upload, sequence, created_at, transport, payload, due_at, attempts, error, dead = row
    return Event(
        id,
        HookType(type),
        upload,
        sequence,
        created_at,
        transport,
        record.decode(payload),
        due_at,
        attempts,
        error,
        bool(dead),
    )
