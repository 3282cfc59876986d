"""The info store in Redis, held to the contract, among processes, and while Redis is away."""

from __future__ import annotations

import pytest
import redis_service

from tuswsgi.infostores.redis import RedisInfoStore
from tuswsgi.testing.infostores import InfoStoreContract


@pytest.fixture
def settings():
    with redis_service.own_keys() as settings:
        yield settings


class TestRedisInfoStore(InfoStoreContract):
    @pytest.fixture
    def store(self, settings):
        yield from self._prepared(redis_service.url(), settings)

    @pytest.fixture
    def other(self, store, settings):
        # Another spelling of the address is another pool.
        yield from self._prepared(f"{redis_service.url()}/", settings)

    def _prepared(self, url, settings):
        store = RedisInfoStore(url, settings=settings)
        store.prepare()
        yield store
        store.close()
