"""Uploads as a rustus leaves them: its files, and its records in the form of its JSON."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The fields of a record in rustus' order, since 0.4.
FIELDS = (
    *("id", "offset", "length", "path", "created_at", "deferred_size"),
    *("is_partial", "is_final", "parts", "storage", "metadata"),
)

#: The ones that 0.1 to 0.3 wrote.
FIRST_FIELDS = (*FIELDS[:6], "metadata")


class Rustus:
    """What is left of a rustus.

    :param data_dir: its data directory.
    :param keep: keeps the JSON of an id where its info storage does.
    """

    def __init__(self, data_dir: Path, keep: Callable[[str, str], object]) -> None:
        self.data_dir = data_dir
        self._keep = keep

    def upload(
        self,
        data: bytes,
        length: int | None,
        *,
        directory: str = "2024/5/1",
        known: tuple[str, ...] = FIELDS,
        **fields: Any,
    ) -> str:
        """Leave an upload with its file, and return its id.

        :param length: as it was promised; ``None`` if that is deferred.
        :param directory: what rustus made of its ``dir_structure``.
        :param known: the fields that its release writes.
        :param fields: what the record says otherwise.
        """
        id = str(uuid.uuid4())
        file = self.data_dir.resolve() / directory / id
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        record = {
            "id": id,
            "offset": len(data),
            "length": length,
            "path": str(file),
            "created_at": int(time.time()) - 3600,
            "deferred_size": length is None,
            "is_partial": False,
            "is_final": False,
            "parts": None,
            "storage": "file_storage",
            "metadata": {},
            **fields,
        }
        # serde_json: no blanks, and text as it is.
        written = {name: record[name] for name in known}
        self.keep(id, json.dumps(written, separators=(",", ":"), ensure_ascii=False))
        return id

    def keep(self, id: str, text: str) -> None:
        """Leave any text as the record of an id."""
        self._keep(id, text)


def in_files(info_dir: Path) -> Callable[[str, str], object]:
    """Return how rustus' ``file-info-storage`` keeps records."""
    info_dir.mkdir(parents=True, exist_ok=True)
    return lambda id, text: (info_dir / f"{id}.info").write_text(text, "utf-8")
