"""Connections to database servers: what happens to transactions when something fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import databases
import pytest
from private_servers import PrivateMariaDb, PrivatePostgres

from tuswsgi.connections.databases import connect
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.sql import SqlConnection
from tuswsgi.core.errors import StorageFull, Unavailable

ROOT = Path(__file__).parent.parent

#: Queries that end all connections of a test but their own, or return the statements that do.
KILL = {
    "postgres": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()",
    "mysql": "SELECT CONCAT('KILL ', id) FROM information_schema.processlist "
    "WHERE db = DATABASE() AND id <> CONNECTION_ID()",
}

#: Statements that fail with the server's error for a full disk.
FULL = {
    "postgres": "DO $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = 'disk_full'; END $$",
    "mysql": "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1114, MESSAGE_TEXT = 'full'",
}

SLEEP = {"postgres": "SELECT pg_sleep({})", "mysql": "SELECT SLEEP({})"}


@pytest.fixture(params=list(databases.SERVERS))
def dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    with databases.SERVERS[request.param]() as dsn:
        yield dsn


@pytest.fixture
def connection(dsn: str) -> Iterator[SqlConnection]:
    with opened(dsn) as connection:
        yield connection


@contextmanager
def opened(dsn: str, size: int = 3, timeout: float = 10.0) -> Iterator[SqlConnection]:
    connection = connect(dsn, pool=PoolSettings(size, timeout))
    connection.prepare()
    connection.migrate(lambda db: db.execute_sql("CREATE TABLE numbers (n INTEGER PRIMARY KEY)"))
    try:
        yield connection
    finally:
        connection.close()


def add(n: int) -> Any:
    return lambda db: db.execute_sql(f"INSERT INTO numbers VALUES ({n})").rowcount


def numbers(connection: SqlConnection) -> list[int]:
    sql = "SELECT n FROM numbers ORDER BY n"
    return [row[0] for row in connection.read(lambda db: db.execute_sql(sql).fetchall())]


def kill_others(connection: SqlConnection, dsn: str) -> int:
    """End all connections of this process to the database; return how many there were."""
    other = connect(databases.other_spelling(dsn))
    rows = other.read(lambda db: db.execute_sql(KILL[other.kind]).fetchall())
    if other.kind == "mysql":
        for (kill,) in rows:
            other.read(lambda db, kill=kill: db.execute_sql(kill))  # type: ignore[misc]
    other.close()
    return len(rows)


def test_a_write_returns_its_result_and_is_seen(connection: SqlConnection) -> None:
    assert connection.write(add(1)) == 1
    assert numbers(connection) == [1]


def test_a_failing_write_is_undone(connection: SqlConnection) -> None:
    def fail(db: Any) -> None:
        add(1)(db)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        connection.write(fail)
    assert numbers(connection) == []
    connection.write(add(1))
    assert numbers(connection) == [1]


def test_a_swallowed_error_of_the_database_undoes_the_write(
    connection: SqlConnection,
) -> None:
    def overlook(db: Any) -> None:
        add(1)(db)
        try:
            db.execute_sql("SELECT nonsense")
        except Exception:
            pass

    if connection.kind == "mysql":
        connection.write(overlook)  # there it ends no transaction
        assert numbers(connection) == [1]
    else:
        with pytest.raises(Unavailable):
            connection.write(overlook)
        assert numbers(connection) == []


def test_connections_that_the_server_ended_are_replaced(
    connection: SqlConnection, dsn: str
) -> None:
    for n in range(3):
        connection.write(add(n))
        assert kill_others(connection, dsn) == 1
        assert numbers(connection) == list(range(n + 1))
        assert kill_others(connection, dsn) == 1


def test_a_write_whose_connection_breaks_before_the_commit_is_repeated(
    connection: SqlConnection, dsn: str
) -> None:
    calls = 0

    def insert(db: Any) -> None:
        nonlocal calls
        calls += 1
        add(1)(db)
        if calls == 1:
            kill_others(connection, dsn)
        add(2)(db)

    connection.write(insert)
    assert calls == 2
    assert numbers(connection) == [1, 2]


def test_a_write_whose_connections_keep_breaking_fails(
    connection: SqlConnection, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def insert(db: Any) -> None:
        nonlocal calls
        calls += 1
        add(1)(db)
        kill_others(connection, dsn)
        add(2)(db)

    with pytest.raises(Unavailable):
        connection.write(insert)
    assert calls == 2
    assert len(caplog.records) == 1
    assert numbers(connection) == []


def test_a_write_whose_connection_breaks_in_the_commit_is_not_repeated(
    connection: SqlConnection, dsn: str
) -> None:
    calls = 0

    def insert(db: Any) -> None:
        nonlocal calls
        calls += 1
        add(1)(db)
        kill_others(connection, dsn)

    with pytest.raises(Unavailable):
        connection.write(insert)
    assert calls == 1
    assert numbers(connection) == []


def test_deadlocks_are_resolved(connection: SqlConnection) -> None:
    connection.write(lambda db: [add(n)(db) for n in range(2)])
    barrier = threading.Barrier(2)
    calls: list[int] = []

    def touch(first: int, second: int, db: Any) -> None:
        calls.append(first)
        for n in (first, second):
            db.execute_sql(f"UPDATE numbers SET n = n + 10 - 10 WHERE n = {n}")
            if len(calls) <= 2 and n == first:
                barrier.wait(10)

    with ThreadPoolExecutor(2) as pool:
        for future in [
            pool.submit(connection.write, lambda db, a=a: touch(a, 1 - a, db)) for a in range(2)
        ]:
            future.result()
    assert len(calls) == 3


def test_a_full_disk_is_reported(connection: SqlConnection) -> None:
    def fill(db: Any) -> None:
        add(1)(db)
        db.execute_sql(FULL[connection.kind])

    with pytest.raises(StorageFull):
        connection.write(fill)
    assert numbers(connection) == []


def test_an_exhausted_pool_is_unavailable(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    with opened(dsn, size=2, timeout=0.2) as connection:
        busy, free = threading.Barrier(3), threading.Event()

        def occupy(db: Any) -> None:
            busy.wait(10)
            free.wait(10)

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(connection.write, occupy) for _ in range(2)]
            busy.wait(10)
            with pytest.raises(Unavailable):
                numbers(connection)
            free.set()
            for future in futures:
                future.exception()
        assert len(caplog.records) >= 1
        assert numbers(connection) == []


def test_a_statement_that_takes_too_long_is_not_repeated(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(dsn, timeout=0.3) as connection:
        sql = SLEEP[connection.kind].format(60)
        started = time.monotonic()
        with pytest.raises(Unavailable):
            connection.read(lambda db: db.execute_sql(sql).fetchall())
        assert time.monotonic() - started < 30
        assert len(caplog.records) == 1
        assert numbers(connection) == []


def test_waiting_for_a_lock_has_a_timeout(dsn: str) -> None:
    with opened(dsn, timeout=1.0) as connection:
        connection.write(add(1))
        locked, done = threading.Event(), threading.Event()

        def hold(db: Any) -> None:
            db.execute_sql("UPDATE numbers SET n = 2 WHERE n = 1")
            locked.set()
            done.wait(30)
            raise ZeroDivisionError

        holder = connect(databases.other_spelling(dsn))
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(holder.write, hold)
            locked.wait(10)
            with pytest.raises(Unavailable):
                connection.write(lambda db: db.execute_sql("UPDATE numbers SET n = 3 WHERE n = 1"))
            done.set()
            assert isinstance(future.exception(), ZeroDivisionError)
        holder.close()
        assert numbers(connection) == [1]


@pytest.mark.parametrize("scheme", list(databases.SERVERS))
def test_a_server_that_hangs_is_unavailable(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connection = connect(f"{scheme}://me:secret@127.0.0.1:{port}/db", pool=PoolSettings(1, 0.5))
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            numbers(connection)
        assert time.monotonic() - started < 30
        assert len(caplog.records) == 1
        assert "secret" not in caplog.text + str(caught.value)
        connection.close()


@pytest.mark.parametrize("scheme", list(databases.SERVERS))
def test_a_server_that_is_down_is_logged_once(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connection = connect(f"{scheme}://me:secret@127.0.0.1:{port}/db")
    with pytest.raises(Unavailable):
        numbers(connection)
    (line,) = caplog.records
    assert f"127.0.0.1:{port}/db failed" in line.getMessage()
    assert "secret" not in caplog.text
    assert "\n" not in line.getMessage()
    connection.close()


@pytest.mark.parametrize("server", [PrivatePostgres, PrivateMariaDb])
def test_a_server_may_restart(server: Any) -> None:
    private = server()
    try:
        with opened(private.dsn) as connection:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda n: connection.write(add(n)), range(3)))
            private.restart()
            assert numbers(connection) == [0, 1, 2]
            connection.write(add(3))
            private.kill()
            with pytest.raises(Unavailable):
                connection.write(add(4))
            private.start()
            connection.write(add(5))
            assert numbers(connection) == [0, 1, 2, 3, 5]
    finally:
        private.remove()


TICKING = """
from gevent import monkey; monkey.patch_all()
import sys, time
import gevent
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.databases import connect

dsn, sql = sys.argv[1:]
connection = connect(dsn, pool=PoolSettings(4, 10.0))
gaps = []

def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.005)
        gaps.append(time.monotonic() - last)
        last = time.monotonic()

gevent.spawn(tick)
sleep = lambda db: db.execute_sql(sql).fetchall()
started = time.monotonic()
# More greenlets than connections: the last ones wait in the pool.
greenlets = [gevent.spawn(run, sleep) for run in (connection.read, connection.write) * 3]
gevent.joinall(greenlets, raise_error=True)
assert time.monotonic() - started < 9, "they wait for each other"
assert max(gaps) < 1.0, max(gaps)
# The connection of a greenlet that is killed in the middle of a statement is closed.
victim = gevent.spawn(connection.write, sleep)
gevent.sleep(0.1)
victim.kill()
one = lambda db: db.execute_sql("SELECT 1").fetchall()
for _ in range(8):
    assert [tuple(row) for row in connection.read(one)] == [(1,)]
connection.close()
"""


@pytest.mark.parametrize("before", ["", "import peewee, tuswsgi.connections.databases; "])
def test_the_hub_is_not_blocked(dsn: str, before: str) -> None:
    sql = SLEEP[connect(dsn).kind].format(1.5)
    run_python(before + TICKING.strip(), dsn, sql)


def run_python(code: str, *args: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""


def test_passwords_may_contain_any_characters() -> None:
    password = "pä:ss/w@rd#%кошка"
    with databases.mysql() as dsn:
        parts = urlsplit(dsn)
        user = parts.path.removeprefix("/")
        server = databases.mysql_server(databases.mysql_url())
        cursor = server.cursor()
        cursor.execute("CREATE USER %s IDENTIFIED BY %s", (user, password))
        try:
            cursor.execute(f"GRANT ALL ON {user}.* TO %s", (user,))
            netloc = f"{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}"
            with opened(parts._replace(netloc=netloc).geturl()) as connection:
                assert numbers(connection) == []
        finally:
            cursor.execute("DROP USER %s", (user,))
            server.close()


def test_hosts_of_postgres_are_tried_in_turn() -> None:
    with databases.postgres() as dsn:
        parts = urlsplit(dsn)
        user, _, host = parts.netloc.rpartition("@")
        dsn = parts._replace(netloc=f"{user}@127.0.0.1:1,{host}").geturl()
        with opened(dsn) as connection:
            assert numbers(connection) == []
