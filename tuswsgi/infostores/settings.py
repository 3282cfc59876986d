"""The options that all info stores have in common: which one it is, and at which address."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tuswsgi.core.options import option


class InfoStoreName(str, Enum):
    """Where the records of uploads can be kept."""

    SQL = "db-info-storage"
    REDIS = "redis-info-storage"
    FILE = "file-info-storage"
    MEMORY = "memory-info-storage"


@dataclass(frozen=True)
class InfoStoreSettings:
    """Where the records of uploads are kept."""

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
