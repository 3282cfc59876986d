"""The connection to SQLite: group commit, waiting for other processes, and failures."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tuswsgi.connections import sqlite
from tuswsgi.connections.databases import connect
from tuswsgi.core.errors import ConfigurationError, StorageFull, Unavailable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sub" / "test.sqlite3"


@pytest.fixture
def connection(path):
    connection = connect(f"sqlite:///{path}")
    connection.prepare()
    connection.write(lambda db: db.execute_sql("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    yield connection
    connection.close()


@pytest.fixture
def foreign(connection, path):
    """A connection of another process, which holds the write lock until it rolls back."""
    foreign = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    foreign.execute("BEGIN IMMEDIATE")
    yield foreign
    foreign.close()


def add(n, seen=None):
    def insert(database):
        database.execute_sql("INSERT INTO t VALUES (?)", (n,))
        if seen is not None:
            seen.append(n)
        return n

    return insert


def add_and_fail(n):
    def insert(database):
        add(n)(database)
        raise ZeroDivisionError

    return insert


def numbers(connection):
    rows = connection.read(lambda db: db.execute_sql("SELECT n FROM t ORDER BY n").fetchall())
    return [row[0] for row in rows]


def queued(connection):
    return len(connection._handles.get().writer._queue)


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_write_returns_its_result_and_is_seen(connection):
    assert connection.write(add(1)) == 1
    assert numbers(connection) == [1]


def test_a_failing_write_is_undone(connection):
    with pytest.raises(ZeroDivisionError):
        connection.write(add_and_fail(1))
    assert numbers(connection) == []
    assert connection.write(add(1)) == 1


def test_waiting_writes_share_a_commit_but_no_failure(connection, foreign):
    commits = []
    with ThreadPoolExecutor(20) as pool:
        good = [pool.submit(connection.write, add(n)) for n in range(10)]
        bad = [pool.submit(connection.write, add_and_fail(100 + n)) for n in range(10)]
        wait_until(lambda: queued(connection) == 20)
        database = connection._handles.get().writer._database
        original = database.execute_sql

        def count_commits(sql, params=None):
            commits.extend([sql] * (sql == "COMMIT"))
            return original(sql, params)

        database.execute_sql = count_commits
        foreign.execute("ROLLBACK")
        assert [future.result() for future in good] == list(range(10))
        assert all(isinstance(future.exception(), ZeroDivisionError) for future in bad)
    assert numbers(connection) == list(range(10))
    assert len(commits) == 1


def test_the_lead_is_passed_on(connection, foreign, monkeypatch):
    monkeypatch.setattr(sqlite, "_BATCH", 3)
    order = []
    with ThreadPoolExecutor(10) as pool:
        futures = []
        for n in range(10):
            futures.append(pool.submit(connection.write, add(n, order)))
            wait_until(lambda: queued(connection) == len(futures))
        foreign.execute("ROLLBACK")
        assert [future.result() for future in futures] == list(range(10))
    assert order == list(range(10))


def test_waiting_for_other_processes_has_a_timeout(connection, foreign, monkeypatch):
    monkeypatch.setattr(sqlite, "_TIMEOUT", 0.05)
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(connection.write, add(n)) for n in range(5)]
        assert all(isinstance(future.exception(), Unavailable) for future in futures)
    assert numbers(connection) == []
    foreign.execute("ROLLBACK")
    connection.write(add(1))
    assert numbers(connection) == [1]


def test_a_failed_commit_fails_all_its_writes(connection, foreign):
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(connection.write, add(n)) for n in range(3)]
        wait_until(lambda: queued(connection) == 3)
        database = connection._handles.get().writer._database
        original = database.execute_sql

        def fail_to_commit(sql, params=None):
            return original("COMMIT nonsense" if sql == "COMMIT" else sql, params)

        database.execute_sql = fail_to_commit
        foreign.execute("ROLLBACK")
        assert all(isinstance(future.exception(), Unavailable) for future in futures)
        database.execute_sql = original
    assert numbers(connection) == []
    connection.write(add(1))
    assert numbers(connection) == [1]


def test_a_full_disk_is_reported(connection):
    def limit(database):
        (pages,) = database.execute_sql("PRAGMA page_count").fetchone()
        database.execute_sql(f"PRAGMA max_page_count = {pages}")

    def fill(database):
        for n in range(10_000):
            add(n)(database)

    connection.write(limit)
    with pytest.raises(StorageFull):
        connection.write(fill)
    assert numbers(connection) == []
    # The limit ended with the connection, as if the disk had been cleaned up.
    connection.write(fill)
    assert len(numbers(connection)) == 10_000


def test_an_interrupted_waiter_leaves_nothing_behind(connection, foreign):
    """Raised while a greenlet waits, like a timeout of gevent."""

    class Struck(threading.Event):
        def wait(self, timeout=None):
            wait_until(lambda: queued(connection) == 2)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(connection.write, add(1))
        wait_until(lambda: queued(connection) == 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite, "threading", SimpleNamespace(Event=Struck))
            with pytest.raises(KeyboardInterrupt):
                connection.write(add(2))
        foreign.execute("ROLLBACK")
        leader.result()
    connection.write(add(3))
    assert numbers(connection) == [1, 3]


def test_an_interrupted_leader_passes_the_lead_on(connection, foreign, monkeypatch):
    monkeypatch.setattr(sqlite, "_BATCH", 1)

    class Struck(threading.Event):
        def wait(self, timeout=None):
            super().wait(timeout)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(connection.write, add(1))
        wait_until(lambda: queued(connection) == 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite, "threading", SimpleNamespace(Event=Struck))
            second = pool.submit(connection.write, add(2))
            wait_until(lambda: queued(connection) == 2)
        third = pool.submit(connection.write, add(3))
        wait_until(lambda: queued(connection) == 3)
        foreign.execute("ROLLBACK")
        assert first.result() == 1
        assert isinstance(second.exception(), KeyboardInterrupt)
        assert third.result() == 3
    assert numbers(connection) == [1, 3]


def test_closing_waits_for_writes(connection, foreign):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(connection.write, add(1))
        wait_until(lambda: queued(connection) == 1)
        connection.close()
        foreign.execute("ROLLBACK")
        assert future.result() == 1
    assert numbers(connection) == [1]


def test_one_dsn_is_one_connection(path, connection):
    assert connect(f"sqlite:///{path}") is connection
    assert connect(f"sqlite:///{path}", force_fsync=True) is not connection


@pytest.mark.parametrize(
    "dsn",
    ["oracle://me:secret@host/db", "secret", "sqlite://", "sqlite:///", "sqlite:///:memory:"],
)
def test_errors_about_dsns_contain_no_secrets(dsn):
    with pytest.raises(ConfigurationError, match="Supported: sqlite:///") as caught:
        connect(dsn)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_a_database_is_reported(tmp_path):
    (tmp_path / "x").write_text("no database" * 1000)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        connect(f"sqlite:///{tmp_path}/x").prepare()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        connect(f"sqlite:///{tmp_path}/x/y").prepare()
