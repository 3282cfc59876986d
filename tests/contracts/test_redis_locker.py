"""The locker in Redis, held to the contracts, among processes, and while Redis is away."""

from __future__ import annotations

import pytest
import redis_service

from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.redis import RedisLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import LockerContract


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
        locker = RedisLocker(url, settings=settings, beside=FileLocker(self.directory))
        locker.prepare()
        yield locker
        locker.close()


class TestRedisLeases(LeaseContract):
    @pytest.fixture
    def make(self, url, settings):
        return lambda lease, beside: RedisLocker(url, lease=lease, beside=beside, settings=settings)
