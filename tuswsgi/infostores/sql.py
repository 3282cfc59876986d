"""Records of uploads in an SQL database, through peewee.

The statements are text, since peewee takes longer to build a statement than the database to run
it. ``connections.tables`` has the tables, ``connections.sql`` connections and transactions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
_LIST = """
SELECT record FROM tuswsgi_uploads WHERE state IN ({states}) AND id > ? ORDER BY id LIMIT ?
"""
_FORGET = """
DELETE FROM tuswsgi_uploads
WHERE id = ? AND sequence = ? AND deleted_at IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM tuswsgi_events WHERE upload = ?)
"""
# In two halves, since the sum of large uploads may not fit into a column.
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
_EVENTS = f"SELECT {_EVENT} FROM tuswsgi_events WHERE upload = ? ORDER BY sequence, number"
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
_SET_FREE_AT = "UPDATE tuswsgi_events SET free_at = ? WHERE number = ? AND free_at IS NULL"
_CLEAR_FREE_AT = """
UPDATE tuswsgi_events SET free_at = NULL
WHERE upload = ? AND transport = ? AND number <> ? AND free_at IS NOT NULL
"""
_COUNT_STATES = "SELECT COUNT(*) FROM tuswsgi_uploads WHERE state IN (?, ?)"
#: In pages, since SQLite blocks the process while a statement runs.
_COUNT_STALLED = """
SELECT MAX(id), SUM(CASE WHEN {last_byte} <= ? THEN 1 ELSE 0 END) FROM (
    SELECT id, created_at, record FROM tuswsgi_uploads
    WHERE state = ? AND id > ? ORDER BY id LIMIT 2000
) AS page
"""
#: When the last byte came, which only the record says.
_LAST_BYTE = {
    "sqlite": "COALESCE(json_extract(record, '$.last_byte_at'), created_at)",
    "postgres": "COALESCE(CAST(CAST(record AS json)->>'last_byte_at' AS float8), created_at)",
    "mysql": "COALESCE(JSON_VALUE(record, '$.last_byte_at') + 0.0, created_at)",
}
_COUNT_EVENTS = "SELECT COUNT(*) FROM tuswsgi_events WHERE dead = ?"
_OLDEST = "SELECT created_at FROM tuswsgi_events WHERE dead = ? ORDER BY number LIMIT 1"
_WAIT = "INSERT INTO tuswsgi_waiting (part, final) VALUES (?, ?)"
_STOP_WAITING = "DELETE FROM tuswsgi_waiting WHERE final = ?"
_WAITING_FOR = "SELECT final FROM tuswsgi_waiting WHERE part = ? ORDER BY final"


@dataclass(repr=False, eq=False)
class SqlInfoStore(InfoStore):
    """Records in a database that all workers share.

    :param info_db_dsn: the database, see ``connections.sql.connect``.
    :param force_fsync: let commits survive a power loss.
    """

    info_db_dsn: str
    force_fsync: bool = False
    pool: PoolSettings = PoolSettings()

    def __post_init__(self) -> None:
        self._connection = connect(self.info_db_dsn, force_fsync=self.force_fsync, pool=self.pool)
        #: Returns a statement with the placeholders of the driver.
        self._sql = cache(self._connection.statement)

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
            lambda database: bool(database.execute_sql(self._sql(_FORGET), values).rowcount)
        )

    def load(self, id: str) -> FileInfo:
        row = self._one(_LOAD, (id,))
        if row is None:
            raise UploadNotFound
        return record.load(record.decode(row[0]))

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        wanted = [state.value for state in State if states is None or state in states]
        if not wanted:
            return []  # "IN ()" is not valid SQL
        marks = ", ".join("?" * len(wanted))
        rows = self._all(_LIST.format(states=marks), (*wanted, after, limit))
        return [record.load(record.decode(row[0])) for row in rows]

    def usage(self) -> int:
        high, low = self._one(_USAGE, ())
        return (int(high or 0) << 32) + int(low or 0)

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        return [row[0] for row in self._all(_EXPIRED, (now, limit))]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        return [row[0] for row in self._all(_WAITING_FOR, (part,))]

    def census(self, stalled_before: float) -> Census:
        states = (State.RECEIVING.value, State.WAITING.value)
        count_stalled = _COUNT_STALLED.format(last_byte=_LAST_BYTE[self._connection.kind])
        stalled = 0
        after = ""
        while after is not None:
            values = (stalled_before, State.RECEIVING.value, after)
            after, found = self._one(count_stalled, values)
            stalled += int(found or 0)
            let_others_run()
        oldest = self._one(_OLDEST, (False,))
        return Census(
            self._one(_COUNT_STATES, states)[0],
            stalled,
            self._one(_COUNT_EVENTS, (False,))[0],
            self._one(_COUNT_EVENTS, (True,))[0],
            None if oldest is None else oldest[0],
        )

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        events = [_event(row) for row in self._all(_EVENTS, (id,))]
        return [event for event in events if event.dead is dead]

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
        # Reading takes no lock: usually there is nothing to claim.
        if self._one(f"SELECT 1 {text} LIMIT 1", (*wanted.values(),)) is None:
            return []
        find = f"SELECT {_EVENT}, number, free_at {text} ORDER BY free_at, number LIMIT ?"
        values = (*wanted.values(), limit)
        return self._connection.write(partial(self._run_claim, find, values, worker, until))

    def renew(self, worker: str, until: float) -> None:
        values = (until, until, worker)
        self._connection.write(
            lambda database: database.execute_sql(self._sql(_RENEW), values).rowcount
        )

    def settle(self, event: Event) -> None:
        values = (event.id, event.transport)
        self._connection.write(partial(self._change, event, _SETTLE, values))

    def put_back(self, event: Event) -> None:
        changes = (event.due_at, event.attempts, _text(event.error), event.dead)
        values = (*changes, event.id, event.transport)
        self._connection.write(partial(self._change, event, _PUT_BACK, values))

    def undelivered(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        return [_event(row) for row in self._all(_OUTBOX, (dead, limit))]

    def _run_create(self, info: FileInfo, events: Sequence[Event], database: Database) -> None:
        try:
            database.execute_sql(
                self._sql(_CREATE),
                (info.id, info.state.value, info.sequence, info.created_at, *_columns(info)),
            )
        except peewee.IntegrityError:
            raise UploadExists from None
        self._add(info, events, database)

    def _run_save(self, saved: FileInfo, events: Sequence[Event], database: Database) -> None:
        cursor = database.execute_sql(
            self._sql(_SAVE),
            (saved.state.value, saved.sequence, *_columns(saved), saved.id, saved.sequence - 1),
        )
        if cursor.rowcount == 0:
            found = database.execute_sql(self._sql(_EXISTS), (saved.id,)).fetchone()
            raise InfoConflict if found else UploadNotFound
        if saved.is_final:
            database.execute_sql(self._sql(_STOP_WAITING), (saved.id,))
        self._add(saved, events, database)

    def _add(self, info: FileInfo, events: Sequence[Event], database: Database) -> None:
        if info.state is State.WAITING:
            for part in dict.fromkeys(info.partial_uploads):
                database.execute_sql(self._sql(_WAIT), (part, info.id))
        for event in events:
            database.execute_sql(self._sql(_ADD_EVENT), _row(event))
            self._free_first(event.upload, event.transport, database)

    def _run_claim(
        self, find: str, values: tuple[Any, ...], worker: str, until: float, database: Database
    ) -> Sequence[Event]:
        claimed = []
        for *row, number, free_at in database.execute_sql(self._sql(find), values).fetchall():
            claim = (worker, until, until, number, free_at)
            # On a server, another worker may have claimed it in the meantime.
            if database.execute_sql(self._sql(_CLAIM), claim).rowcount:
                claimed.append(_event(row))
        return claimed

    def _change(self, event: Event, sql: str, values: tuple[Any, ...], database: Database) -> None:
        # The upload is locked against new events: one that is written at the same time would
        # find this event before it, and would never be set free.
        lock = self._sql(_EXISTS) + self._connection.for_update
        database.execute_sql(lock, (event.upload,)).fetchone()
        database.execute_sql(self._sql(sql), values)
        self._free_first(event.upload, event.transport, database)

    def _free_first(self, upload: str, transport: str, database: Database) -> None:
        """Set ``free_at`` of the first event that is not dead, and clear it for all others."""
        row = database.execute_sql(self._sql(_FIRST), (upload, transport)).fetchone()
        if row is None:
            return
        number, due_at, claimed_until, free_at = row
        if free_at is None:
            database.execute_sql(self._sql(_CLEAR_FREE_AT), (upload, transport, number))
            database.execute_sql(self._sql(_SET_FREE_AT), (max(due_at, claimed_until), number))

    def _one(self, sql: str, values: tuple[Any, ...]) -> Any:
        return self._connection.read(
            lambda database: database.execute_sql(self._sql(sql), values).fetchone()
        )

    def _all(self, sql: str, values: tuple[Any, ...]) -> Any:
        return self._connection.read(
            lambda database: database.execute_sql(self._sql(sql), values).fetchall()
        )


def _columns(info: FileInfo) -> tuple[Any, ...]:
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
    """Return a text without characters that some databases refuse."""
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
