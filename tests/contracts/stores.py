"""Info stores for tests among processes: each process makes its own by the directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import databases

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.infostores.sql import SqlInfoStore

Make = Callable[[Path], InfoStore]


def sqlite(directory: Path, *, durable: bool = False) -> InfoStore:
    return SqlInfoStore(f"sqlite:///{directory}/db/info.sqlite3", force_fsync=durable)


def files(directory: Path) -> InfoStore:
    return FileInfoStore(directory / "info")


def on_server(directory: Path) -> InfoStore:
    dsn = (directory / "dsn").read_text("utf-8")
    return SqlInfoStore(dsn, pool=PoolSettings(databases.POOL_SIZE))


#: What makes a store, by its kind.
MAKERS: dict[str, Make] = {
    "sqlite": sqlite,
    "durable sqlite": partial(sqlite, durable=True),
    "files": files,
    **dict.fromkeys(databases.SERVERS, on_server),
}

#: All but what differs only in how long it takes.
KINDS = [kind for kind in MAKERS if kind != "durable sqlite"]

SQL = [kind for kind in KINDS if kind != "files"]


@contextmanager
def shared(kind: str, directory: Path) -> Iterator[Make]:
    """Yield what makes stores of a kind that share their records, by the directory."""
    if kind not in databases.SERVERS:
        yield MAKERS[kind]
        return
    with databases.SERVERS[kind]() as dsn:
        (directory / "dsn").write_text(dsn, "utf-8")
        yield MAKERS[kind]
