"""The locker in Redis, held to the contracts, among processes, and while Redis is away."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import redis
import services

from tuswsgi.connections.redis import RedisSettings
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.redis import RedisLocker
from tuswsgi.testing.leases import LeaseContract
from tuswsgi.testing.lockers import LockerContract


@pytest.fixture
def url() -> str:
    return services.find("REDIS_URL", "redis://127.0.0.1:6379")


@pytest.fixture
def settings(url: str) -> Iterator[RedisSettings]:
    """A prefix of the test's own, below which nothing stays."""
    settings = RedisSettings(f"tuswsgi-test-{secrets.token_hex(8)}:")
    yield settings
    with redis.Redis.from_url(url) as client:
        for key in client.scan_iter(f"{settings.redis_prefix}*"):
            client.delete(key)


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
