"""The options that all lockers have in common: which one it is, where, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tuswsgi.core.options import Duration, option


class LockerName(str, Enum):
    """What can keep two requests from writing one upload."""

    FILE = "file-locker"
    MEMORY = "memory-locker"
    REDIS = "redis-locker"
    SQL = "db-locker"
    ETCD = "etcd-locker"
    CONSUL = "consul-locker"


@dataclass(frozen=True)
class LockerSettings:
    """What keeps two requests from writing one upload."""

    locker: LockerName | None = option(
        None,
        "What keeps two requests from writing one upload: `file-locker` works between all "
        "workers of one host, `memory-locker` within one worker, and the others between all "
        "hosts that share a server. Unset: that of the server that has the records, else "
        "`file-locker`.",
    )
    locker_dsn: str | None = option(
        None,
        "The server of the locker. `redis-locker`: as in `info_db_dsn` (unset: that one). "
        "`db-locker`: a database as for `info_db_dsn` (unset: that "
        "one). `etcd-locker`: `http://host:2379` or `https://user:password@host:2379`, several "
        "addresses separated by commas (unset: this host). `consul-locker`: "
        "`http://:token@host:8500`, likewise.",
        secret=True,
    )
    lock_lease: float = option(
        10.0,
        "After how long a lock on a server is free when its host died. etcd takes a quarter "
        "more, and Consul takes at least 10 s and up to two and a half times that.",
        kind=Duration,
    )
    lock_timeout: float = option(
        20.0,
        "How long a request waits for another one to let go of its upload (423 after that).",
        kind=Duration,
    )
    runtime_dir: Path | None = option(
        None,
        "The directory for the locks and sockets of this host, on a disk of its own. Unset: "
        "`.tuswsgi` below the data directory.",
    )
