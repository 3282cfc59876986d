"""The options that choose the locker and its server, and that all lockers share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tuswsgi.core.options import Duration, option


class LockerName(str, Enum):
    """The lockers."""

    FILE = "file-locker"
    MEMORY = "memory-locker"
    REDIS = "redis-locker"
    SQL = "db-locker"
    ETCD = "etcd-locker"
    CONSUL = "consul-locker"


@dataclass(frozen=True)
class LockerSettings:
    """How uploads are locked, so that one request at a time writes each of them."""

    locker: LockerName | None = option(
        None,
        "Where the locks of uploads are kept. `memory-locker` works within one worker, "
        "`file-locker` between all workers of a host, and the others between all hosts that use "
        "the same server. Unset: `redis-locker` or `db-locker` if the records are on such a "
        "server, else `file-locker`.",
    )
    locker_dsn: str | None = option(
        None,
        "The address of the locker's server. For `redis-locker` and `db-locker` it is written as "
        "in `info_db_dsn` (unset: the server of the records). For `etcd-locker`: "
        "`http://host:2379` or `https://user:password@host:2379`, several addresses separated by "
        "commas (unset: this host). For `consul-locker`, which was only tested against a stand-in "
        "for Consul: `http://:token@host:8500`, likewise.",
        secret=True,
    )
    lock_lease: float = option(
        10.0,
        "How long a lock on a server outlives a host that died. With etcd it is a quarter "
        "longer; with Consul it is at least 10 s, and up to two and a half times as long.",
        kind=Duration,
    )
    lock_timeout: float = option(
        20.0,
        "How long a request waits for the lock of an upload before it is refused (423).",
        kind=Duration,
    )
    runtime_dir: Path | None = option(
        None,
        "The directory of this host's locks and sockets, on a local file system. Unset: "
        "`.tuswsgi` below the data directory.",
    )
