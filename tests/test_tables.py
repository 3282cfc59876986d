"""The tables of a database: made once, upgraded, and left alone where they are newer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuswsgi.connections.sql import SqlConnection, connect
from tuswsgi.connections.tables import SCHEMA, prepare_tables, version
from tuswsgi.errors import ConfigurationError


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[SqlConnection]:
    connection = connect(f"sqlite:///{tmp_path}/tables.sqlite3")
    connection.prepare()
    yield connection
    connection.close()


def run(connection: SqlConnection, *statements: str) -> None:
    connection.migrate(lambda database: [database.execute_sql(text) for text in statements])


def test_the_clock_is_that_of_the_database(connection: SqlConnection) -> None:
    sql = f"SELECT {connection.now}"
    before = time.time()
    (now,) = connection.read(lambda database: database.execute_sql(sql).fetchone())
    assert isinstance(now, float)
    assert before - 0.01 < now < time.time() + 0.01


def test_an_empty_database_gets_the_tables(connection: SqlConnection) -> None:
    assert version(connection) == 0
    prepare_tables(connection)
    assert version(connection) == SCHEMA
    run(connection, "INSERT INTO tuswsgi_locks VALUES ('id', 'token', 'worker', 1.5, FALSE)")


def test_older_tables_are_upgraded(connection: SqlConnection) -> None:
    prepare_tables(connection)
    run(
        connection,
        "INSERT INTO tuswsgi_waiting VALUES ('part', 'final')",
        "DROP TABLE tuswsgi_locks",
        "UPDATE tuswsgi_schema SET version = 1",
    )
    prepare_tables(connection)
    assert version(connection) == SCHEMA
    run(connection, "INSERT INTO tuswsgi_locks VALUES ('id', 'token', 'worker', 1.5, FALSE)")
    sql = "SELECT * FROM tuswsgi_waiting"
    rows = connection.read(lambda database: database.execute_sql(sql).fetchall())
    assert [tuple(row) for row in rows] == [("part", "final")]


def test_what_a_dead_maker_left_is_completed(connection: SqlConnection) -> None:
    prepare_tables(connection)
    run(connection, "DELETE FROM tuswsgi_schema", "DROP TABLE tuswsgi_waiting")
    assert version(connection) == 0
    prepare_tables(connection)
    run(connection, "INSERT INTO tuswsgi_waiting VALUES ('part', 'final')")


def test_newer_tables_are_left_alone(connection: SqlConnection) -> None:
    prepare_tables(connection)
    run(connection, "UPDATE tuswsgi_schema SET version = 99")
    with pytest.raises(ConfigurationError, match=f"version 99.*needs version {SCHEMA}"):
        prepare_tables(connection)
    assert version(connection) == 99
