"""The options that choose the info store and its server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tuswsgi.core.options import option


class InfoStoreName(str, Enum):
    """The info stores."""

    SQL = "db-info-storage"
    REDIS = "redis-info-storage"
    FILE = "file-info-storage"
    MEMORY = "memory-info-storage"


@dataclass(frozen=True)
class InfoStoreSettings:
    """Where the records of uploads are kept."""

    info_storage: InfoStoreName = option(
        InfoStoreName.SQL,
        "Where the records of uploads are kept. Redis must be configured with `appendonly yes`, "
        "or it loses records when it restarts (with `appendfsync always`, or it loses the last "
        "second when its machine crashes), and with `maxmemory-policy noeviction`, or it drops "
        "records when its memory is full.",
        rustus="INFO_STORAGE",
        short="i",
    )
    info_db_dsn: str | None = option(
        None,
        "The address of the info store. For `db-info-storage`: `sqlite:////absolute/path`, "
        "`sqlite:///relative/path`, `postgres://user:password@host/database` or "
        "`mysql://user:password@host/database`; percent-encode special characters, and add "
        "parameters of the driver behind a `?`, e.g. `sslmode=require`. Tables are created and "
        "upgraded at the start. Unset: a SQLite file in `.tuswsgi` below the data directory. For "
        "`redis-info-storage`: `redis://[user:password@]host[:6379][/0]`, `rediss://...`, "
        "`unix:///path` or `redis+sentinel://host:26379,host2:26379/service/0`.",
        rustus="INFO_DB_DSN",
        secret=True,
    )
