"""Info stores for tests among processes: each process makes its own by the directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import databases
import redis_service

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.infostores.redis import RedisInfoStore
from tuswsgi.infostores.sql import SqlInfoStore

Make = Callable[[Path], InfoStore]


def sqlite(directory: Path, *, force_fsync: bool = False) -> InfoStore:
    return SqlInfoStore(f"sqlite:///{directory}/db/info.sqlite3", force_fsync=force_fsync)


def files(directory: Path) -> InfoStore:
    return FileInfoStore(directory / "info")


def in_redis(directory: Path) -> InfoStore:
    return RedisInfoStore(redis_service.url(), settings=redis_service.settings_of(directory))


def on_server(directory: Path) -> InfoStore:
    dsn = (directory / "dsn").read_text("utf-8")
    return SqlInfoStore(dsn, pool=PoolSettings(databases.POOL_SIZE))


#: What makes a store, by its kind.
MAKERS: dict[str, Make] = {
    "sqlite": sqlite,
    "durable sqlite": partial(sqlite, force_fsync=True),
    "files": files,
    "redis": in_redis,
    **dict.fromkeys(databases.SERVERS, on_server),
}

#: All but what differs only in how long it takes.
KINDS = [kind for kind in MAKERS if kind != "durable sqlite"]

SQL = [kind for kind in KINDS if kind not in ("files", "redis")]


@contextmanager
def shared(kind: str, directory: Path) -> Iterator[Make]:
    """Yield what makes stores of a kind that share their records, by the directory."""
    if kind not in databases.SERVERS:
        yield MAKERS[kind]
        if kind == "redis":
            redis_service.remove_keys(redis_service.settings_of(directory))
        return
    with databases.SERVERS[kind]() as dsn:
        (directory / "dsn").write_text(dsn, "utf-8")
        yield MAKERS[kind]
