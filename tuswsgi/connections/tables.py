"""The tables of records, events and locks, and the version of their schema.

The definitions are SQL with a few words per dialect. The statements that read and write the
tables are in the info store, the outbox and the locker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import peewee

from tuswsgi.connections.sql import Database, SqlConnection
from tuswsgi.core.errors import ConfigurationError

#: The version of the tables below.
SCHEMA = 1


@dataclass(frozen=True)
class _Dialect:
    """The SQL in which databases differ.

    :param names: appended to the type of columns that are compared byte by byte, as in Python.
    :param text: the type of texts of any length.
    :param number: the type of an auto-incrementing primary key.
    :param options: appended to every table.
    :param clustered: appended to tables that are stored in the order of their key.
    :param partial: whether an index may have a WHERE clause.
    :param inline: whether indexes are created in the statement that creates the table, because
        the database cannot undo one of two statements.
    """

    names: str = ""
    text: str = "TEXT"
    number: str = "BIGINT"
    options: str = ""
    clustered: str = ""
    partial: bool = True
    inline: bool = False


_DIALECTS = {
    # A write writes a page of each tree that it changes: the fewer trees, the better.
    "sqlite": _Dialect(number="INTEGER", clustered=" WITHOUT ROWID"),
    "postgres": _Dialect(names=' COLLATE "C"', number="BIGSERIAL"),
    "mysql": _Dialect(
        text="LONGTEXT",
        number="BIGINT AUTO_INCREMENT",
        options=" ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin",
        partial=False,
        inline=True,
    ),
}


@dataclass(frozen=True)
class _Index:
    columns: str
    unique: bool = False
    where: str = ""


@dataclass(frozen=True)
class _Table:
    """A table.

    :param columns: SQL, with the names of a dialect's fields in braces.
    """

    name: str
    columns: str
    indexes: tuple[_Index, ...] = ()
    clustered: bool = False

    def statements(self, dialect: _Dialect) -> list[str]:
        """Return the statements that create the table and its indexes unless they exist."""
        columns = self.columns.format_map(vars(dialect)).strip()
        others = [self._index(index, dialect) for index in self.indexes]
        if dialect.inline:
            columns = ",\n".join([columns, *others])
            others = []
        end = dialect.options + (dialect.clustered if self.clustered else "")
        return [f"CREATE TABLE IF NOT EXISTS {self.name} ({columns}){end}", *others]

    def _index(self, index: _Index, dialect: _Dialect) -> str:
        name = f"{self.name}_{index.columns.replace(', ', '_')}"
        kind = "UNIQUE INDEX" if index.unique else "INDEX"
        if dialect.inline:
            return f"{kind} {name} ({index.columns})"
        where = f" WHERE {index.where}" if index.where and dialect.partial else ""
        return f"CREATE {kind} IF NOT EXISTS {name} ON {self.name} ({index.columns}){where}"


#: One row: the version of the tables.
_SCHEMA = _Table(
    "tuswsgi_schema",
    """
    id INTEGER NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL
    """,
)

#: The records. The other columns are for searching, comparing and adding up. `expires_at` is NULL
#: once the upload is finished or deleted. `promised` is in an index because records are long.
_UPLOADS = _Table(
    "tuswsgi_uploads",
    """
    id VARCHAR(128){names} NOT NULL PRIMARY KEY,
    state VARCHAR(16){names} NOT NULL,
    sequence BIGINT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    expires_at DOUBLE PRECISION,
    finished_at DOUBLE PRECISION,
    deleted_at DOUBLE PRECISION,
    promised BIGINT NOT NULL DEFAULT 0,
    record {text} NOT NULL
    """,
    (
        _Index("state, id, promised"),
        # Most uploads are finished, or never expire.
        _Index("expires_at", where="expires_at IS NOT NULL"),
    ),
    clustered=True,
)

#: The events; numbers give the order of events that were written together. An event may be
#: claimed after `free_at`: it is due then, and any claim has expired. That is NULL for dead
#: letters, and for events that wait for an earlier one of the same upload and transport, so that
#: a query for events to deliver does not read them.
_EVENTS = _Table(
    "tuswsgi_events",
    """
    number {number} NOT NULL PRIMARY KEY,
    upload VARCHAR(128){names} NOT NULL,
    transport VARCHAR(128){names} NOT NULL,
    sequence BIGINT NOT NULL,
    event_id VARCHAR(128){names} NOT NULL,
    type VARCHAR(32){names} NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    payload {text} NOT NULL,
    due_at DOUBLE PRECISION NOT NULL,
    attempts INTEGER NOT NULL,
    error {text},
    dead BOOLEAN NOT NULL,
    claimed_by VARCHAR(128){names},
    claimed_until DOUBLE PRECISION NOT NULL,
    free_at DOUBLE PRECISION
    """,
    (
        # An upload has few events, so that the index does not contain their order.
        _Index("upload, transport, free_at"),
        _Index("event_id, transport", unique=True),
        _Index("transport, free_at"),
        _Index("free_at"),
        _Index("claimed_by"),
        _Index("dead, number"),
    ),
)

#: Which final uploads wait for which parts.
_WAITING = _Table(
    "tuswsgi_waiting",
    """
    part VARCHAR(128){names} NOT NULL,
    final VARCHAR(128){names} NOT NULL,
    PRIMARY KEY (part, final)
    """,
    (_Index("final"),),
)

#: The locks of the SQL locker, see ``lockers.sql``.
_LOCKS = _Table(
    "tuswsgi_locks",
    """
    id VARCHAR(128){names} NOT NULL PRIMARY KEY,
    token VARCHAR(255){names} NOT NULL,
    writer VARCHAR(255){names} NOT NULL,
    worker VARCHAR(255){names} NOT NULL,
    ends_at DOUBLE PRECISION NOT NULL,
    release_requested BOOLEAN NOT NULL
    """,
    (_Index("worker"),),
)

_TABLES = (_SCHEMA, _UPLOADS, _EVENTS, _WAITING, _LOCKS)


def version(connection: SqlConnection) -> int:
    """Return the version of the database's tables, 0 if there are none.

    :raises Unavailable: if the database cannot be reached.
    """
    return connection.read(_version)


def prepare_tables(connection: SqlConnection) -> None:
    """Create the tables unless they exist. Several processes may do so at once.

    The connection is closed afterwards, so that the caller may fork.

    :raises ConfigurationError: if the database cannot be used, or its tables have another
        version.
    """
    connection.prepare()
    try:
        found = version(connection)
        if not found:
            connection.migrate(lambda database: _create(database, _DIALECTS[connection.kind]))
        elif found != SCHEMA:
            raise ConfigurationError(
                f"The tables of the database {connection} have version {found}, but this tuswsgi "
                f"needs version {SCHEMA}: a newer tuswsgi made them, or one from before the first "
                "release. Run that one, or use another database."
            )
    finally:
        connection.close()


def _create(database: Database, dialect: _Dialect) -> None:
    # Another process may have created them. One that died halfway has left some of the tables
    # behind where the database cannot roll that back.
    if _version(database):
        return
    for table in _TABLES:
        for statement in table.statements(dialect):
            database.execute_sql(statement)
    database.execute_sql(f"INSERT INTO tuswsgi_schema (id, version) VALUES (1, {SCHEMA})")


def _version(database: Database) -> int:
    if not cast(peewee.Database, database).table_exists("tuswsgi_schema"):
        return 0
    row = database.execute_sql("SELECT version FROM tuswsgi_schema").fetchone()
    return 0 if row is None else cast(int, row[0])
