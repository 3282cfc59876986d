"""Which backends the configuration makes, and what is said of them before the server starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import redis_service

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.redis import RedisLocker
from tuswsgi.lockers.sql import SqlLocker

REDIS = "redis://127.0.0.1"
POSTGRES = "postgres://me@127.0.0.1/uploads"


def config(directory: Path, **flags: Any) -> Config:
    return Config.load(flags={"data_dir": str(directory), **flags})


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({}, FileLocker),
        ({"info_storage": "file-info-storage"}, FileLocker),
        ({"info_db_dsn": "sqlite:////tmp/info.sqlite3"}, FileLocker),
        ({"info_db_dsn": POSTGRES}, SqlLocker),
        ({"info_storage": "redis-info-storage", "info_db_dsn": REDIS}, RedisLocker),
        ({"info_db_dsn": POSTGRES, "locker": "file-locker"}, FileLocker),
        ({"info_db_dsn": POSTGRES, "locker": "redis-locker", "locker_dsn": REDIS}, RedisLocker),
    ],
)
def test_locks_reach_as_far_as_the_records(
    tmp_path: Path, flags: dict[str, str], kind: type
) -> None:
    made = Backends(config(tmp_path, **flags)).locker()
    assert type(made) is kind
    if not isinstance(made, FileLocker):
        # Whoever dies on this host is found out at once.
        assert isinstance(made.host_locker, FileLocker)
        assert made.host_locker.directory == (tmp_path / ".tuswsgi" / "locks").absolute()


@pytest.mark.parametrize(
    "flags",
    [
        {"info_storage": "redis-info-storage"},
        {"info_storage": "redis-info-storage", "info_db_dsn": POSTGRES},
        {"locker": "redis-locker"},
        {"locker": "redis-locker", "locker_dsn": "redis://:secret@host:port/0"},
    ],
)
def test_redis_needs_an_address(tmp_path: Path, flags: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"redis://.*6379") as caught:
        Backends(config(tmp_path, **flags)).prepare()
    assert "secret" not in str(caught.value)


def test_locks_of_one_host_for_records_of_many_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = redis_service.url()
    redis = {"info_storage": "redis-info-storage", "info_db_dsn": url}
    for flags, warned in (
        ({"locker": "file-locker", **redis}, True),
        ({"locker": "memory-locker", **redis}, True),
        (redis, False),
        ({"locker": "file-locker"}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tuswsgi.config.backends"):
            Backends(config(tmp_path, **flags)).prepare()
        assert ("only while one host serves them" in caplog.text) is warned
