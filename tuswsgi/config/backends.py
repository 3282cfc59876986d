"""The settings that choose the backends, and where on this host these keep what is theirs.

This file owns the names and what follows from them; how a backend is made of its settings is
``registry``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tuswsgi.connections.databases import is_server
from tuswsgi.core.options import Duration, option


class DataStoreName(str, Enum):
    """Where the bytes of uploads can be kept."""

    FILE = "file-storage"
    MEMORY = "memory-storage"


class InfoStoreName(str, Enum):
    """Where the records of uploads can be kept."""

    SQL = "db-info-storage"
    REDIS = "redis-info-storage"
    FILE = "file-info-storage"
    MEMORY = "memory-info-storage"


class LockerName(str, Enum):
    """What can keep two requests from writing one upload."""

    FILE = "file-locker"
    MEMORY = "memory-locker"
    REDIS = "redis-locker"
    SQL = "db-locker"
    ETCD = "etcd-locker"
    CONSUL = "consul-locker"


@dataclass(frozen=True)
class Backends:
    """Which backends keep uploads, and where on this host."""

    storage: DataStoreName = option(
        DataStoreName.FILE,
        "Where the bytes of uploads are kept. In memory they are lost with the process.",
        rustus="STORAGE",
        short="s",
    )
    info_storage: InfoStoreName = option(
        InfoStoreName.SQL,
        "Where the records of uploads are kept. Without `info_db_dsn` the database is a "
        "SQLite file below the data directory. What Redis acknowledged survives its death only "
        "with `appendonly yes` (that of its machine: `appendfsync always`), and it keeps what it "
        "has only with `maxmemory-policy noeviction`.",
        rustus="INFO_STORAGE",
        short="i",
    )
    info_db_dsn: str | None = option(
        None,
        "The database of the info store: `sqlite:////absolute/path`, `sqlite:///relative/path`, "
        "`postgres://user:password@host/database` or `mysql://user:password@host/database`; "
        "special characters are percent-encoded, and what stands behind a `?` is for the driver, "
        "e.g. `sslmode=require`. Missing tables are created and older ones upgraded at the start. "
        "Unset: a SQLite file beside the data. Of `redis-info-storage`: "
        "`redis://[user:password@]host[:6379][/0]`, `rediss://...`, `unix:///path` or "
        "`redis+sentinel://host:26379,host2:26379/service/0`.",
        rustus="INFO_DB_DSN",
        secret=True,
    )
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
    data_dir: Path = option(
        Path("./data"),
        "The directory of uploads. What the server needs besides is in `.tuswsgi` below it.",
        rustus="DATA_DIR",
    )
    runtime_dir: Path | None = option(
        None,
        "The directory for the locks and sockets of this host, on a disk of its own. Unset: "
        "`.tuswsgi` below the data directory.",
    )
    force_fsync: bool = option(
        False,
        "Acknowledge bytes only when they would survive a power loss.",
        rustus="FORCE_FSYNC",
    )
    lock_timeout: float = option(
        20.0,
        "How long a request waits for another one to let go of its upload (423 after that).",
        kind=Duration,
    )

    @property
    def own_dir(self) -> Path:
        """The directory for everything of the server's that is no upload."""
        return self.data_dir / ".tuswsgi"

    @property
    def lock_dir(self) -> Path:
        """The directory of this host's locks."""
        return (self.runtime_dir or self.own_dir) / "locks"

    @property
    def metrics_dir(self) -> Path:
        """The directory where this host's servers count for their metrics."""
        return (self.runtime_dir or self.own_dir) / "metrics"

    @property
    def database(self) -> str:
        """The DSN of the info store's database, if it is one."""
        return self.info_db_dsn or f"sqlite:///{self.own_dir.absolute()}/info.sqlite3"

    @property
    def is_shared(self) -> bool:
        """Whether the records are on a server, which other hosts may use too."""
        if self.info_storage is InfoStoreName.SQL:
            return is_server(self.database)
        return self.info_storage is InfoStoreName.REDIS

    @property
    def chosen_locker(self) -> LockerName:
        """The locker, by default one that reaches as far as the records do."""
        if self.locker is not None or not self.is_shared:
            return self.locker or LockerName.FILE
        return LockerName.SQL if self.info_storage is InfoStoreName.SQL else LockerName.REDIS

    @property
    def in_memory(self) -> bool:
        """Whether a part of the state is one process' own, so that there must be only one."""
        return (
            self.storage is DataStoreName.MEMORY
            or self.info_storage is InfoStoreName.MEMORY
            or self.locker is LockerName.MEMORY
        )
