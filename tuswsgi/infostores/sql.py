"""Records of uploads in an SQL database, through peewee.

This file owns the tables and the statements; connections and transactions are those of
``connections.sql``. The models say how the tables look. Statements that run on every
request are written as text, since building them anew takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import peewee

from tuswsgi.connections.sql import Database, connect
from tuswsgi.errors import ConfigurationError, InfoConflict, UploadExists, UploadNotFound
from tuswsgi.hooks.base import Event, HookType
from tuswsgi.info import FileInfo, State
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.options import option

#: The version of the tables below.
SCHEMA = 1


class Schema(peewee.Model):
    """One row: the version of the tables."""

    id = peewee.IntegerField(primary_key=True)
    version = peewee.IntegerField()

    class Meta:
        table_name = "tuswsgi_schema"


class Upload(peewee.Model):
    """One record. The columns beside it are what is searched for and compared."""

    id = peewee.CharField(max_length=128, primary_key=True)
    state = peewee.CharField(max_length=16)
    sequence = peewee.BigIntegerField()
    created_at = peewee.DoubleField()
    #: When the clean-up shall come, so nothing once the upload is finished or gone.
    expires_at = peewee.DoubleField(null=True, index=True)
    finished_at = peewee.DoubleField(null=True)
    deleted_at = peewee.DoubleField(null=True)
    record = peewee.TextField()

    class Meta:
        table_name = "tuswsgi_uploads"
        indexes = ((("state", "id"), False),)


class PendingEvent(peewee.Model):
    """One event; its number tells the order of events that were written together."""

    number = peewee.BigAutoField()
    upload = peewee.CharField(max_length=128)
    sequence = peewee.BigIntegerField()
    event_id = peewee.CharField(max_length=128)
    type = peewee.CharField(max_length=32)
    created_at = peewee.DoubleField()
    held = peewee.BooleanField()
    payload = peewee.TextField()

    class Meta:
        table_name = "tuswsgi_events"
        indexes = ((("upload", "sequence", "number"), False),)


class Waiting(peewee.Model):
    """A final upload that waits for a part."""

    part = peewee.CharField(max_length=128)
    final = peewee.CharField(max_length=128, index=True)

    class Meta:
        table_name = "tuswsgi_waiting"
        primary_key = peewee.CompositeKey("part", "final")


_CREATE = """
INSERT INTO tuswsgi_uploads
(id, state, sequence, created_at, expires_at, finished_at, deleted_at, record)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_EXISTS = "SELECT 1 FROM tuswsgi_uploads WHERE id = ?"
_LOAD = "SELECT record FROM tuswsgi_uploads WHERE id = ?"
_SAVE = """
UPDATE tuswsgi_uploads
SET state = ?, sequence = ?, expires_at = ?, finished_at = ?, deleted_at = ?, record = ?
WHERE id = ? AND sequence = ?
"""
_EXPIRED = """
SELECT id FROM tuswsgi_uploads WHERE expires_at <= ? ORDER BY expires_at LIMIT ?
"""
_ADD_EVENT = """
INSERT INTO tuswsgi_events (upload, sequence, event_id, type, created_at, held, payload)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_EVENTS = """
SELECT event_id, type, upload, sequence, created_at, payload, held
FROM tuswsgi_events WHERE upload = ? ORDER BY sequence, number
"""
_WAIT = "INSERT INTO tuswsgi_waiting (part, final) VALUES (?, ?)"
_WAIT_NO_MORE = "DELETE FROM tuswsgi_waiting WHERE final = ?"
_WAITING_FOR = "SELECT final FROM tuswsgi_waiting WHERE part = ? ORDER BY final"


@dataclass(repr=False, eq=False)
class SqlInfoStore(InfoStore):
    """Records in a database that all workers share."""

    info_db_dsn: str = option(
        None,
        "The database of the info store: `sqlite:////absolute/path` or "
        "`sqlite:///relative/path`. Unset: a file beside the data.",
        rustus="INFO_DB_DSN",
        secret=True,
    )
    force_fsync: bool = False

    def __post_init__(self) -> None:
        if not self.info_db_dsn:
            raise ConfigurationError("The info store needs info_db_dsn.")
        self._connection = connect(self.info_db_dsn, durable=self.force_fsync)
        text = self._connection.statement
        self._create, self._exists, self._load = text(_CREATE), text(_EXISTS), text(_LOAD)
        self._save, self._expired = text(_SAVE), text(_EXPIRED)
        self._add_event, self._events = text(_ADD_EVENT), text(_EVENTS)
        self._wait, self._wait_no_more = text(_WAIT), text(_WAIT_NO_MORE)
        self._waiting_for = text(_WAITING_FOR)

    def prepare(self) -> None:
        self._connection.prepare()
        self._connection.write(_make_tables)
        # Whoever prepares may fork afterwards, and connections do not survive that.
        self._connection.close()

    def close(self) -> None:
        self._connection.close()

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        self._connection.write(partial(self._run_create, info, events))

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        saved = info.but(sequence=info.sequence + 1)
        self._connection.write(partial(self._run_save, saved, events))
        return saved

    def load(self, id: str) -> FileInfo:
        row = self._one(self._load, (id,))
        if row is None:
            raise UploadNotFound
        return record.load(record.decode(row[0]))

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        wanted = [state.value for state in State if states is None or state in states]
        marks = ", ".join("?" * len(wanted))
        sql = self._connection.statement(
            "SELECT record FROM tuswsgi_uploads "
            f"WHERE state IN ({marks}) AND id > ? ORDER BY id LIMIT ?"
        )
        rows = self._all(sql, (*wanted, after, limit))
        return [record.load(record.decode(row[0])) for row in rows]

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        return [row[0] for row in self._all(self._expired, (now, limit))]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        return [row[0] for row in self._all(self._waiting_for, (part,))]

    def events(self, id: str) -> Sequence[Event]:
        return [_event(row) for row in self._all(self._events, (id,))]

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
        record.encode(record.dump(info)),
    )


def _row(event: Event) -> tuple[Any, ...]:
    payload = record.encode(event.payload)
    return (
        event.upload,
        event.sequence,
        event.id,
        event.type.value,
        event.created_at,
        event.held,
        payload,
    )


def _event(row: tuple[Any, ...]) -> Event:
    id, type, upload, sequence, created_at, payload, held = row
    return Event(
        id, HookType(type), upload, sequence, created_at, record.decode(payload), bool(held)
    )


def _make_tables(database: Database) -> None:
    for model in (Schema, Upload, PendingEvent, Waiting):
        peewee.SchemaManager(model, cast(peewee.Database, database)).create_all(safe=True)
    row = database.execute_sql("SELECT version FROM tuswsgi_schema").fetchone()
    if row is None:
        database.execute_sql(f"INSERT INTO tuswsgi_schema (id, version) VALUES (1, {SCHEMA})")
    elif row[0] > SCHEMA:
        raise ConfigurationError(
            f"The info store's tables are of version {row[0]}: a newer tuswsgi made them."
        )
