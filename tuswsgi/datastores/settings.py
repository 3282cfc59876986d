"""The options that choose the data store, and that all data stores share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tuswsgi.core.options import option


class DataStoreName(str, Enum):
    """The data stores."""

    FILE = "file-storage"
    MEMORY = "memory-storage"


@dataclass(frozen=True)
class DataStoreSettings:
    """Where the bytes of uploads are stored."""

    storage: DataStoreName = option(
        DataStoreName.FILE,
        "Where the bytes of uploads are stored. In memory they are lost with the process.",
        rustus="STORAGE",
        short="s",
    )
    data_dir: Path = option(
        Path("./data"),
        "The directory of uploads. The server keeps its own files in `.tuswsgi` below it.",
        rustus="DATA_DIR",
    )
    force_fsync: bool = option(
        False,
        "Write bytes and records to the disk (fsync) before they are acknowledged, so that they "
        "survive a power loss.",
        rustus="FORCE_FSYNC",
    )
