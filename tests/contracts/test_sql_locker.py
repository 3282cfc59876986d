"""Locks in SQL databases."""

from __future__ import annotations

import time
from contextlib import ExitStack

import databases
import pytest
from private_servers import PrivateMariaDb, PrivatePostgres

from tuswsgi.connections.databases import connect
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import LockLost, Unavailable, UploadLocked
from tuswsgi.lockers.sql import SqlLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import LockerContract, Requests, ignore


def rows(dsn):
    connection = connect(dsn)
    sql = "SELECT id FROM tuswsgi_locks ORDER BY id"
    return connection.read(lambda database: [row[0] for row in database.execute_sql(sql)])


class OnDatabase(LockerContract):
    """A locker whose database is the fixture `dsn`."""

    @pytest.fixture
    def locker(self, dsn):
        yield from self._prepared(dsn)

    @pytest.fixture
    def other(self, locker, dsn):
        yield from self._prepared(databases.other_spelling(dsn))

    def _prepared(self, dsn):
        locker = SqlLocker(dsn, lock_lease=1.0, pool=PoolSettings(databases.POOL_SIZE))
        locker.prepare()
        yield locker
        locker.close()

    def test_nothing_is_left_behind(self, locker, other, dsn):
        self.test_other_instances_share_the_locks(locker, other)
        assert rows(dsn) == []

    def test_an_expired_lease_is_taken_over(self, locker, other):
        assert locker._take("a", "dead.worker.1")
        self._expect_locked_by_a_try(other)
        with other.lock("a", ignore):
            locker._free("a", "dead.worker.1")
            self._expect_locked_by_a_try(locker)

    @staticmethod
    def _expect_locked_by_a_try(locker):
        with pytest.raises(UploadLocked), locker.try_lock("a", ignore):
            pytest.fail("two holders")

    def test_rows_of_dead_holders_are_removed_after_a_month(self, locker, other, dsn):
        for id in ("a", "b"):
            assert locker._take(id, "dead.worker.1")
        with locker.lock("c", ignore):
            while locker._holder("b"):
                time.sleep(0.05)
            locker._change(
                "UPDATE tuswsgi_locks SET ends_at = ends_at - ? WHERE id = 'a'", 31 * 86400
            )
            other.prepare()
            # The holder of the other one may only be paused.
            assert rows(dsn) == ["b", "c"]


class LeasesOnDatabase(LeaseContract):
    def test_a_lock_whose_release_failed_expires(self, near, far, monkeypatch):
        with near.lock("another", ignore), ExitStack() as held:
            held.enter_context(near.lock("a", ignore))
            with monkeypatch.context() as away:
                self._cut_off(near, away)
                held.close()
            with far.lock("a", ignore):
                pass

    @pytest.fixture
    def make(self, dsn):
        pool = PoolSettings(databases.POOL_SIZE)
        return lambda lease, host_locker: SqlLocker(
            dsn, lock_lease=lease, host_locker=host_locker, pool=pool
        )


class Sqlite:
    @pytest.fixture
    def dsn(self, tmp_path):
        return f"sqlite:///{tmp_path}/locks.sqlite3"


class Postgres:
    @pytest.fixture
    def dsn(self):
        with databases.postgres() as dsn:
            yield dsn


class Mysql:
    @pytest.fixture
    def dsn(self):
        with databases.mysql() as dsn:
            yield dsn


class TestSqlLockerOnSqlite(Sqlite, OnDatabase):
    pass


class TestSqlLockerOnPostgres(Postgres, OnDatabase):
    pass


class TestSqlLockerOnMysql(Mysql, OnDatabase):
    pass


class TestSqlLeasesOnSqlite(Sqlite, LeasesOnDatabase):
    pass


class TestSqlLeasesOnPostgres(Postgres, LeasesOnDatabase):
    pass


class TestSqlLeasesOnMysql(Mysql, LeasesOnDatabase):
    pass


@pytest.mark.parametrize("kind", [PrivatePostgres, PrivateMariaDb])
def test_locks_are_lost_when_the_database_goes_and_work_when_it_is_back(kind, caplog):
    server, lost = kind(), Requests()
    try:
        lockers = [
            SqlLocker(dsn, lock_lease=1.0, pool=PoolSettings(databases.POOL_SIZE, 2.0))
            for dsn in (server.dsn, databases.other_spelling(server.dsn))
        ]
        for locker in lockers:
            locker.prepare()
        locker, other = lockers
        with locker.lock("a", lost) as hold:
            server.kill()
            with pytest.raises(Unavailable), other.lock("b", ignore):
                pytest.fail("locked")
            lost.wait_for(LockLost)
            assert hold.is_lost()
        server.start()
        with other.lock("a", ignore):
            pass
        TestSqlLockerOnSqlite().test_other_instances_share_the_locks(locker, other)
        for locker in lockers:
            locker.close()
    finally:
        server.remove()
    assert not [record for record in caplog.records if record.exc_info]
