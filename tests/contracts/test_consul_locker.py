"""Locks in Consul, tested against a stand-in."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from consul_stub import ConsulStub

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import ConfigurationError, LockLost, Unavailable
from tuswsgi.lockers.consul import ConsulLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import LockerContract, Requests, ignore

SETTINGS = PoolSettings(pool_timeout=2.0)


@pytest.fixture
def consul():
    stub = ConsulStub()
    yield stub
    stub.remove()


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch):
    monkeypatch.setattr(ConsulLocker, "shortest", 0.0)


@contextmanager
def prepared(dsn, lease=2.0):
    locker = ConsulLocker(dsn, lock_lease=lease, pool=SETTINGS)
    locker.prepare()
    try:
        yield locker
    finally:
        locker.close()


class TestConsulLocker(LockerContract):
    @pytest.fixture
    def locker(self, consul):
        yield from self._prepared(consul)

    @pytest.fixture
    def other(self, locker, consul):
        yield from self._prepared(consul)

    def _prepared(self, consul):
        locker = ConsulLocker(consul.dsn, lock_lease=2.0, pool=SETTINGS)
        locker.prepare()
        yield locker
        locker.close()

    @pytest.mark.parametrize("id", ["photo.jpg", "a b", "каша", "a/b", "..", "?index=1", "%2e"])
    def test_ids_that_are_not_valid_keys_of_consul(self, locker, other, id):
        other.lock_timeout = 0.01
        with locker.lock(id, ignore):
            self._expect_locked(other, id)
        with other.lock(id, ignore):
            pass

    def test_locks_are_lost_with_the_session(self, locker, other, consul):
        requests = Requests()
        with locker.lock("a", requests) as hold:
            consul.end_session(locker._find_holder("a")[1])
            with other.lock("a", ignore):
                requests.wait()
                assert hold.is_lost()
                with locker.lock("b", ignore) as hold_of_b:
                    assert not hold_of_b.is_lost()
        assert isinstance(requests.reasons[-1], LockLost)

    def test_one_of_many_locks_is_lost_alone(self, locker, other):
        # More than a transaction can ask for.
        ids = [f"{number}" for number in range(100)]
        requests = {id: Requests() for id in ids}
        holds = [locker.lock(id, requests[id]) for id in ids]
        lost = {id: hold.__enter__() for id, hold in zip(ids, holds, strict=True)}
        try:
            other._free("77", locker._holder("77"))
            requests["77"].wait()
            assert [id for id in ids if lost[id].is_lost()] == ["77"]
        finally:
            for hold in holds:
                hold.__exit__(None, None, None)

    def test_nothing_is_left_behind(self, locker, other, consul):
        self.test_other_instances_share_the_locks(locker, other)
        assert consul.keys == {}


class TestConsulLeases(LeaseContract):
    @pytest.fixture
    def make(self, consul):
        return lambda lease, host_locker: ConsulLocker(
            consul.dsn, lock_lease=lease, host_locker=host_locker
        )


def test_locks_are_lost_when_consul_goes_and_work_when_it_is_back(consul, caplog):
    lost = Requests()
    with prepared(consul.dsn) as locker, prepared(consul.dsn) as other:
        with locker.lock("a", lost) as hold:
            consul.kill()
            with pytest.raises(Unavailable), other.lock("b", ignore):
                pytest.fail("locked")
            lost.wait()
            assert hold.is_lost()
            assert isinstance(lost.reasons[0], LockLost)
        consul.start()
        TestConsulLocker().test_other_instances_share_the_locks(locker, other)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_lock_whose_release_failed_expires(consul):
    with (
        prepared(consul.dsn, lease=4.0) as locker,
        prepared(consul.dsn) as other,
        locker.lock("b", ignore) as hold,
    ):
        with locker.lock("a", ignore):
            consul.kill()
        consul.start()
        with other.lock("a", ignore):
            assert not hold.is_lost()


def test_leases_are_as_long_as_consul_wants_them(monkeypatch, consul):
    monkeypatch.undo()
    with prepared(consul.dsn, lease=1.0) as locker:
        assert locker.lock_lease == 10.0
        with locker.lock("a", ignore):
            assert [session.seconds >= 10 for session in consul.sessions.values()] == [True]


def test_a_token_is_used():
    consul = ConsulStub(token="s:3cret")
    dsn = consul.dsn.replace("://", "://:s%3A3cret@")
    try:
        with prepared(dsn) as locker, locker.lock("a", ignore):
            pass
        with pytest.raises(ConfigurationError, match="refuses us: 403"):
            ConsulLocker(consul.dsn, pool=SETTINGS).prepare()
    finally:
        consul.remove()


def test_a_consul_that_is_not_there_may_come_later():
    consul = ConsulStub()
    consul.kill()
    with pytest.raises(Unavailable):
        ConsulLocker(consul.dsn, pool=SETTINGS).prepare()
