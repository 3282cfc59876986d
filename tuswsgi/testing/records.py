"""Records of uploads and events to test with, and calls at the same time.

What a test needs besides, it gives as fields.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import FileInfo, FinalResponse, Metadata, State, Storage, new_id

T = TypeVar("T")


def upload(id: str | None = None, **fields: Any) -> FileInfo:
    """Return the record of a new upload with the given fields."""
    return FileInfo(id=new_id() if id is None else id, created_at=1.5, **fields)


def event(info: FileInfo, type: HookType = HookType.POST_RECEIVE, **fields: Any) -> Event:
    """Return an event that comes with a write of `info`."""
    values = {"sequence": info.sequence, "created_at": 2.5, "payload": {"n": 1}, **fields}
    return Event(id=new_id(), type=type, upload=info.id, **values)


def full() -> FileInfo:
    """Return a record that has something in every field."""
    return FileInfo(
        id=new_id(),
        size=12,
        offset=7,
        metadata=Metadata.of({"filename": "кошка.txt", "empty": b"", "raw": bytes(range(256))}),
        is_partial=True,
        is_final=True,
        concat="final;/files/a /files/b",
        partial_uploads=("a", "b", "a"),
        storage=Storage("file_storage", "2024/кошка", {"parts": [{"n": 1, "etag": '"x"'}]}),
        owner="Zoë \N{CAT FACE}",
        state=State.REFUSED,
        response=FinalResponse(422, "Nein.\n", {"X-Reason": "virus"}),
        reserved=9,
        created_at=1700000000.123456,
        last_byte_at=1700000001.1,
        expires_at=1700000002.2,
        finished_at=1700000003.3,
        deleted_at=1700000004.4,
        sequence=5,
    )


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run `calls` at the same time, one thread each, and return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
