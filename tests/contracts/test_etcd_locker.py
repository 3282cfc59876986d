"""Locks in etcd, which is killed, loses its history, and refuses logins."""

from __future__ import annotations

import base64
import os
import secrets
import signal
import time
from contextlib import contextmanager

import pytest
import requests
from private_servers import PATIENCE, PrivateEtcd

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import ConfigurationError, LockLost, Unavailable
from tuswsgi.lockers.etcd import EtcdLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import SOON, LockerContract, Requests, ignore

SETTINGS = PoolSettings(pool_timeout=2.0)


@pytest.fixture(scope="module")
def shared():
    """An etcd for all tests that do not kill it."""
    server = PrivateEtcd()
    yield server
    server.remove()


@pytest.fixture
def own():
    """An etcd for one test."""
    server = PrivateEtcd()
    yield server
    server.remove()


@contextmanager
def prepared(dsn, lease=2.0):
    locker = EtcdLocker(dsn, lock_lease=lease, pool=SETTINGS)
    locker.prepare()
    try:
        yield locker
    finally:
        locker.close()


def call(server, path, headers=None, **request):
    answer = requests.post(f"{server.dsn}{path}", json=request, headers=headers, timeout=SOON)
    answer.raise_for_status()
    return answer.json()


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def keys(server, prefix):
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    found = call(server, "/v3/kv/range", key=encoded(prefix), range_end=encoded(end))
    return [base64.b64decode(item["key"]).decode() for item in found.get("kvs", ())]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def expect_request(holder, other, id):
    """Expect that a holder receives a release request."""
    requests = Requests()
    other.lock_timeout = 0.2
    with LockerContract._held(holder, id, requests) as release:
        wait_until(lambda: LockerContract._expect_locked(other, id) or requests.reasons)
        release.set()


class TestEtcdLocker(LockerContract):
    @pytest.fixture
    def prefix(self):
        return f"test-{secrets.token_hex(4)}/"

    @pytest.fixture
    def locker(self, shared, prefix):
        yield from self._prepared(shared, prefix)

    @pytest.fixture
    def other(self, locker, shared, prefix):
        yield from self._prepared(shared, prefix)

    def _prepared(self, server, prefix):
        locker = EtcdLocker(server.dsn, lock_lease=2.0, prefix=prefix)
        locker.prepare()
        yield locker
        locker.close()

    def test_locks_are_lost_with_the_session(self, locker, other, shared):
        requests = Requests()
        with locker.lock("a", requests) as hold:
            lease = locker._find_holder("a")[1]
            call(shared, "/v3/lease/revoke", ID=lease)
            with other.lock("a", ignore):
                requests.wait()
                assert hold.is_lost()
                with locker.lock("b", ignore) as hold_of_b:
                    assert not hold_of_b.is_lost()
        assert isinstance(requests.reasons[-1], LockLost)

    def test_a_new_session_does_not_bring_old_locks_back(self, locker, shared):
        requests = Requests()
        with locker.lock("a", requests) as hold:
            call(shared, "/v3/lease/revoke", ID=locker._find_holder("a")[1])
            with locker.lock("b", ignore):
                requests.wait()
                assert hold.is_lost()

    def test_requests_arrive_after_a_compaction(self, locker, other, shared, prefix):
        self.test_other_instances_share_the_locks(locker, other)
        header = call(shared, "/v3/kv/put", key=encoded(f"{prefix}x"), value="")["header"]
        call(shared, "/v3/kv/compaction", revision=header["revision"])
        self.test_other_instances_share_the_locks(locker, other)

    def test_nothing_is_left_behind(self, locker, other, shared, prefix):
        self.test_other_instances_share_the_locks(locker, other)
        locker.close()
        other.close()
        wait_until(lambda: keys(shared, prefix) == [])


class TestEtcdLeases(LeaseContract):
    @pytest.fixture
    def make(self, shared):
        prefix = f"test-{secrets.token_hex(4)}/"
        return lambda lease, host_locker: EtcdLocker(
            shared.dsn, lock_lease=lease, host_locker=host_locker, prefix=prefix
        )


def test_locks_are_lost_when_etcd_goes_and_work_when_it_is_back(own, caplog):
    lost = Requests()
    with prepared(own.dsn) as locker, prepared(own.dsn) as other:
        with locker.lock("a", lost) as hold:
            own.kill()
            with pytest.raises(Unavailable), other.lock("b", ignore):
                pytest.fail("locked")
            lost.wait()
            assert hold.is_lost()
            assert isinstance(lost.reasons[0], LockLost)
        own.start()
        expect_request(locker, other, "c")
        other.lock_timeout = SOON
        with other.lock("a", ignore):
            pass
    assert not [record for record in caplog.records if record.exc_info]


def test_a_short_absence_of_etcd_costs_no_lock(own):
    requests = Requests()
    with prepared(own.dsn, lease=20.0) as locker, locker.lock("a", requests) as hold:
        own.restart()
        assert locker._renew({locker._holder("a"): "a"})
        assert not hold.is_lost()
    assert requests.reasons == []


def test_a_lock_whose_release_failed_expires(own):
    with (
        prepared(own.dsn, lease=6.0) as locker,
        prepared(own.dsn) as other,
        locker.lock("b", ignore) as hold,
    ):
        with locker.lock("a", ignore):
            own.kill()
        own.start()
        with other.lock("a", ignore):
            assert not hold.is_lost()


def test_an_etcd_that_hangs_is_not_waited_for(own):
    with (
        prepared(own.dsn, lease=8.0) as locker,
        prepared(own.dsn) as other,
        locker.lock("a", ignore) as hold,
    ):
        os.kill(own._process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable), locker.lock("b", ignore):
                pytest.fail("locked")
        finally:
            os.kill(own._process.pid, signal.SIGCONT)
        # Locks of requests that it served too late do not stay.
        with other.lock("b", ignore):
            assert not hold.is_lost()


def test_another_address_is_asked_when_one_is_gone(own, shared):
    with prepared(f"{own.dsn},{shared.dsn}") as locker:
        with locker.lock("a", ignore):
            pass
        own.kill()
        # In a cluster both would have the same data; these do not.
        with prepared(shared.dsn) as other:
            expect_request(locker, other, "b")
        own.start()


class TestPassword:
    @pytest.fixture
    def server(self, own):
        call(own, "/v3/auth/user/add", name="root", password="s@fe,ty")
        call(own, "/v3/auth/role/add", name="root")
        call(own, "/v3/auth/user/grant", user="root", role="root")
        call(own, "/v3/auth/enable")
        return own

    def dsn(self, server, password):
        return server.dsn.replace("://", f"://root:{password}@")

    def test_it_is_used_and_used_again_after_a_restart(self, server):
        dsn = self.dsn(server, "s%40fe%2Cty")
        with prepared(dsn, lease=20.0) as locker, prepared(dsn) as other:
            for _ in range(2):
                expect_request(locker, other, "a")
                server.restart()

    def test_a_wrong_one_is_said(self, server):
        with pytest.raises(ConfigurationError, match="refuses us"):
            EtcdLocker(self.dsn(server, "wrong"), pool=SETTINGS).prepare()
        with pytest.raises(ConfigurationError, match="refuses us"):
            EtcdLocker(server.dsn, pool=SETTINGS).prepare()

    def test_one_that_nobody_wants_does_no_harm(self, own):
        with prepared(self.dsn(own, "x")) as locker, locker.lock("a", ignore):
            pass


@pytest.mark.parametrize(
    "dsn",
    ["", "redis://:secret@a", "http://", "http://a/secret", "http://:secret@a:b", "http://a,"],
)
def test_a_wrong_dsn_is_reported(dsn):
    with pytest.raises(ConfigurationError, match="not understood") as caught:
        EtcdLocker(dsn)
    assert "secret" not in str(caught.value)


def test_an_etcd_that_is_not_there_may_come_later(own):
    own.kill()
    with pytest.raises(Unavailable):
        EtcdLocker(own.dsn, pool=SETTINGS).prepare()
    own.start()
