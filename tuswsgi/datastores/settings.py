"""The options that all data stores have in common: which one it is, and where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tuswsgi.core.options import option


class DataStoreName(str, Enum):
    """Where the bytes of uploads can be kept."""

    FILE = "file-storage"
    MEMORY = "memory-storage"


@dataclass(frozen=True)
class DataStoreSettings:
    """Where the bytes of uploads are kept."""

    storage: DataStoreName = option(
        DataStoreName.FILE,
        "Where the bytes of uploads are kept. In memory they are lost with the process.",
        rustus="STORAGE",
        short="s",
    )
    data_dir: Path = option(
        Path("./data"),
        "The directory of uploads. What the server needs besides is in `.tuswsgi` below it.",
        rustus="DATA_DIR",
    )
    force_fsync: bool = option(
        False,
        "Acknowledge bytes only when they would survive a power loss.",
        rustus="FORCE_FSYNC",
    )
