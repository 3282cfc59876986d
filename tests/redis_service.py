"""Redis as tests see it: a server that others use too, and keys of a test's own in it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
import services

from tuswsgi.connections.redis import RedisSettings


def url() -> str:
    """Return the address of a Redis server; the test is skipped where there is none."""
    return services.find("REDIS_URL", "redis://127.0.0.1:6379")


def settings_of(directory: Path) -> RedisSettings:
    """Return a prefix that belongs to the directory of a test, also in other processes."""
    return RedisSettings(f"tuswsgi-test-{directory}:")


@contextmanager
def own_keys() -> Iterator[RedisSettings]:
    """Yield a prefix of the test's own, below which nothing stays."""
    settings = RedisSettings(f"tuswsgi-test-{secrets.token_hex(8)}:")
    try:
        yield settings
    finally:
        remove_keys(settings)


def remove_keys(settings: RedisSettings) -> None:
    """Remove all keys below a prefix."""
    with redis.Redis.from_url(url()) as client:
        for key in client.scan_iter(f"{settings.redis_prefix}*", count=1000):
            client.delete(key)
