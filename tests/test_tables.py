"""The tables of a database: created once, and left alone where they have another version."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import databases
import pytest
from click.testing import CliRunner

from tuswsgi.commands.cli import main
from tuswsgi.connections.databases import connect
from tuswsgi.connections.sql import SqlConnection
from tuswsgi.connections.tables import SCHEMA, prepare_tables, version
from tuswsgi.core.errors import ConfigurationError


@pytest.fixture(params=["sqlite", *databases.SERVERS])
def dsn(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tables.sqlite3"
    else:
        with databases.SERVERS[request.param]() as dsn:
            yield dsn


@pytest.fixture
def connection(dsn: str) -> Iterator[SqlConnection]:
    connection = connect(dsn)
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
    run(
        connection,
        "INSERT INTO tuswsgi_locks VALUES ('id', 'token', 'writer', 'worker', 1.5, FALSE)",
    )


def test_what_a_dead_maker_left_is_completed(connection: SqlConnection) -> None:
    prepare_tables(connection)
    run(connection, "DELETE FROM tuswsgi_schema", "DROP TABLE tuswsgi_waiting")
    assert version(connection) == 0
    prepare_tables(connection)
    run(connection, "INSERT INTO tuswsgi_waiting VALUES ('part', 'final')")


@pytest.mark.parametrize("other", [SCHEMA + 98, SCHEMA - 2])
def test_tables_of_another_version_are_left_alone(connection: SqlConnection, other: int) -> None:
    prepare_tables(connection)
    run(connection, f"UPDATE tuswsgi_schema SET version = {other}")
    with pytest.raises(ConfigurationError, match=f"version {other}.*needs version {SCHEMA}"):
        prepare_tables(connection)
    assert version(connection) == other


def db(command: str, *flags: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["db", command, *flags])
    assert result.exit_code == code, result.output
    return result.output


def test_an_operator_sees_the_version_and_upgrades(connection: SqlConnection, dsn: str) -> None:
    flags = ("--info-db-dsn", dsn)
    needed = f"this program needs version {SCHEMA}."
    assert db("version", *flags) == f"{connection}: no tables; {needed}\n"
    for _ in range(2):
        assert db("upgrade", *flags) == f"{connection}: tables of version {SCHEMA}.\n"
    assert db("version", *flags) == f"{connection}: tables of version {SCHEMA}; {needed}\n"
    run(connection, "UPDATE tuswsgi_schema SET version = 99")
    assert "tables of version 99" in db("version", *flags)
    assert "a newer tuswsgi made" in db("upgrade", *flags, code=1)


def test_the_locks_may_have_a_database_of_their_own(tmp_path: Path) -> None:
    locks = f"sqlite:///{tmp_path}/locks.sqlite3"
    flags = ("--data-dir", str(tmp_path), "--locker", "db-locker", "--locker-dsn", locks)
    assert len(db("upgrade", *flags).splitlines()) == 2
    assert version(connect(locks)) == SCHEMA
    only = ("--info-storage", "file-info-storage")
    assert db("version", *flags, *only).count("\n") == 1


def test_without_a_database_there_is_nothing_to_upgrade(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path), "--info-storage", "file-info-storage")
    assert "No SQL database" in db("upgrade", *flags, code=1)


def test_a_database_that_is_away_is_said_without_secrets() -> None:
    dsn = "postgres://me:secret@127.0.0.1:1/db"
    assert "is not available" in (output := db("upgrade", "--info-db-dsn", dsn, code=1))
    assert "secret" not in output
