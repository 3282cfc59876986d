"""The locker in Redis: the contracts, and what happens while Redis is down or hangs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis_service
from line import Line
from private_servers import PrivateRedis
from test_processes import run_python, run_tests_under_gevent

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import LockLost, Unavailable, UploadInterrupted, UploadLocked
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.redis import RedisLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import SOON, LockerContract, Requests, ignore


@pytest.fixture
def url():
    return redis_service.url()


@pytest.fixture
def settings():
    with redis_service.own_keys() as settings:
        yield settings


class TestRedisLocker(LockerContract):
    @pytest.fixture
    def locker(self, url, settings):
        yield from self._prepared(url, settings)

    @pytest.fixture
    def other(self, locker, url, settings):
        yield from self._prepared(url, settings)

    def _prepared(self, url, settings):
        locker = RedisLocker(url, settings=settings)
        locker.prepare()
        yield locker
        locker.close()


class TestRedisLockerBesideFiles(TestRedisLocker):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.directory = tmp_path / "locks"

    def _prepared(self, url, settings):
        locker = RedisLocker(url, settings=settings, host_locker=FileLocker(self.directory))
        locker.prepare()
        yield locker
        locker.close()


class TestRedisLeases(LeaseContract):
    @pytest.fixture
    def make(self, url, settings):
        return lambda lease, host_locker: RedisLocker(
            url, lock_lease=lease, host_locker=host_locker, settings=settings
        )


class TestOnALine:
    """Holders and waiters while Redis cannot be reached."""

    lease = 1.5

    @pytest.fixture
    def line(self, url):
        line = Line(url)
        yield line
        line.close()

    @pytest.fixture
    def near(self, line, settings):
        """A locker that can be cut off."""
        yield from self._prepared(line.url, settings)

    @pytest.fixture
    def far(self, url, settings):
        yield from self._prepared(url, settings)

    def _prepared(self, url, settings):
        pool = PoolSettings(pool_timeout=5.0)
        locker = RedisLocker(url, 60.0, self.lease, pool=pool, settings=settings)
        locker.prepare()
        yield locker
        locker.close()

    @pytest.mark.parametrize("trouble", ["cut", "block"])
    def test_a_holder_is_told_when_redis_fails(self, line, near, far, trouble):
        requests = Requests()
        with near.lock("a", requests) as hold:
            assert not hold.is_lost()
            getattr(line, trouble)()
            with far.lock("a", ignore):
                assert hold.is_lost()
                requests.wait_for(LockLost)
            line.restore()
            line.unblock()
        assert sum(isinstance(reason, LockLost) for reason in requests.reasons) == 1
        for locker in (near, far):
            with locker.lock("a", ignore) as hold:
                assert not hold.is_lost()

    def test_a_waiter_is_told_when_redis_fails(self, line, near, far):
        with far.lock("a", ignore), ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(near._acquire, "a", ignore)
            wait_until(lambda: b"PUBLISH" in line.sent)
            line.cut()
            assert isinstance(waiter.exception(SOON), Unavailable)

    def test_a_short_break_costs_no_lock(self, line, near, far):
        requests = Requests()
        near.lock_lease = 60.0
        with near.lock("a", requests) as hold:
            line.drop()
            with ThreadPoolExecutor(1) as pool:
                waiter = pool.submit(far._acquire, "a", ignore)
                # The subscription recovers, and the request is sent again.
                requests.wait_for(UploadInterrupted)
                assert not hold.is_lost()
                near_token = near._holder("a")
                near._free("a", near_token)
                far._release("a", waiter.result(SOON))

    def test_locks_survive_a_restart_of_redis(self, settings):
        server = PrivateRedis()
        near, far = (RedisLocker(server.dsn, lock_lease=30.0, settings=settings) for _ in "12")
        try:
            requests = Requests()
            with near.lock("a", requests) as hold:
                server.restart()
                wait_until(lambda: is_there(near))
                with pytest.raises(UploadLocked), far.try_lock("a", ignore):
                    pytest.fail("two holders")
                assert not hold.is_lost()
            with far.try_lock("a", ignore):
                pass
            near.close()
            far.close()
        finally:
            server.remove()

    def test_a_lock_whose_answer_got_lost_is_held_once(self, line, near, far):
        with near.lock("b", ignore):
            line.lose_answer()
        line.lose_answer()
        with near.lock("a", ignore) as hold:
            assert not hold.is_lost()
            with pytest.raises(UploadLocked), far.try_lock("a", ignore):
                pytest.fail("two holders")
        with far.try_lock("a", ignore):
            pass


def is_there(locker):
    try:
        return locker._holder("a") is not None
    except Unavailable:
        return False


def wait_until(condition):
    deadline = time.monotonic() + SOON * 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow  # all of these tests once more
def test_the_contracts_hold_under_gevent():
    run_tests_under_gevent("test_redis_locker.py", "test_redis_store.py", "-k", "not gevent")


FORK = """
from gevent import monkey; monkey.patch_all()
import os, sys, time
from tuswsgi.connections.redis import RedisSettings
from tuswsgi.lockers.redis import RedisLocker
from tuswsgi.testing.lockers import ignore

near, far = (
    RedisLocker(sys.argv[1], lock_lease=0.6, settings=RedisSettings(sys.argv[2])) for _ in "12"
)
held = near._acquire("a", ignore)
time.sleep(0.1)
child = os.fork()
if child == 0:
    # The parent's greenlets live on here, and must not renew the parent's locks.
    time.sleep(3)
    os._exit(0)
near._manager.pop().close()
with far.lock("a", ignore):
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
os.waitpid(child, 0)
"""


def test_a_child_does_not_renew_the_locks_of_its_parent(url, settings):
    run_python(FORK, url, settings.redis_prefix)
