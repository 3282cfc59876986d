"""Finds, shows and removes uploads for an operator, as text and as JSON.

It works while servers use the same stores, and takes the same locks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tuswsgi.app import Tus
from tuswsgi.commands.table import span, table
from tuswsgi.config import runtime
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.display import printable
from tuswsgi.core.errors import ConfigurationError, TusError, UploadGone
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.protocol.uploads import Uploads

_HEAD = ("ID", "STATE", "KIND", "SIZE", "OFFSET", "AGE", "OWNER", "FILENAME")


class Kind(str, Enum):
    """The role of an upload in concatenations."""

    PLAIN = "plain"
    PARTIAL = "partial"
    FINAL = "final"

    @classmethod
    def of(cls, info: FileInfo) -> Kind:
        """Return the kind of an upload."""
        if info.is_partial:
            return cls.PARTIAL
        return cls.FINAL if info.is_final else cls.PLAIN


@dataclass(frozen=True)
class Wanted:
    """A filter for uploads; a field that is ``None`` matches all.

    :param before: created before this Unix time.
    :param metadata: pairs that the metadata has, as text.
    :param smallest: the minimum size in bytes; likewise `largest`. The size of an upload whose
        length is deferred is its offset.
    """

    states: frozenset[State] | None = None
    kinds: frozenset[Kind] | None = None
    before: float | None = None
    owner: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    smallest: int | None = None
    largest: int | None = None

    def matches(self, info: FileInfo) -> bool:
        """Return whether an upload passes the filter."""
        size = info.offset if info.size is None else info.size
        return (
            (self.kinds is None or Kind.of(info) in self.kinds)
            and (self.before is None or info.created_at < self.before)
            and (self.owner is None or info.owner == self.owner)
            and (self.smallest is None or size >= self.smallest)
            and (self.largest is None or size <= self.largest)
            and all(info.metadata.text(key) == text for key, text in self.metadata.items())
        )


@contextmanager
def opened(config: Config) -> Iterator[Uploads]:
    """Open the uploads of the configured server.

    :raises ConfigurationError: if they cannot be opened, or are in the server's memory.
    """
    backends = Backends(config)
    if backends.in_memory:
        raise ConfigurationError(
            "Some of the backends are in the server's memory, where no command can reach them."
        )
    backends.check_data_dir()
    tus = Tus(runtime.with_runtime_dir_of_servers(config))
    try:
        tus.prepare()
        yield tus.uploads
    finally:
        tus.drain()
        for hook in tus.hooks.hooks:
            hook.close()
        tus.uploads.data.close()
        tus.uploads.infos.close()
        tus.uploads.locker.close()


def find(
    uploads: Uploads, wanted: Wanted, on_look: Callable[[], None] = lambda: None
) -> Iterator[FileInfo]:
    """Yield the uploads that match, state by state, in the order of their ids.

    :param on_look: called for each upload that is checked.
    """
    for state in State:
        if wanted.states is None or state in wanted.states:
            for info in uploads.infos.scan(state):
                on_look()
                if wanted.matches(info):
                    yield info


def as_table(infos: Sequence[FileInfo]) -> str:
    """Return uploads as a table."""
    now = time.time()
    return table([_HEAD, *(_row(info, now) for info in infos)])


def as_json(info: FileInfo) -> str:
    """Return an upload as JSON on one line, with Unix times."""
    return json.dumps(_fields(info))


@dataclass(frozen=True)
class Details:
    """An upload with its state in the data store and its undelivered events.

    :param offset: the offset according to the data store, ``None`` if the bytes are missing.
    :param location: where the bytes are, e.g. the path of a file.
    :param events: the pending ones and the dead letters.
    """

    info: FileInfo
    offset: int | None
    location: str | None
    events: Sequence[Event]

    @classmethod
    def of(cls, uploads: Uploads, id: str) -> Details:
        """Return the details of an upload, without taking its lock.

        :raises UploadNotFound: if there is none with this id.
        """
        info = uploads.infos.load(id)
        infos = uploads.infos
        try:
            offset = None if info.is_gone else uploads.data.offset(info)
        except UploadGone:
            offset = None
        location = None if offset is None else uploads.data.location(info)
        return cls(info, offset, location, [*infos.events(id), *infos.events(id, dead=True)])

    def as_json(self) -> str:
        """Return the details as JSON on one line."""
        return json.dumps(self._fields())

    def as_text(self) -> str:
        """Return the details as text, a line for each field."""
        lines = []
        for name, value in self._fields().items():
            lines += _lines(name, value)
        return "\n".join(lines)

    def _fields(self) -> dict[str, Any]:
        return {
            **_fields(self.info),
            "offset": self.offset if self.offset is not None else self.info.offset,
            "has_data": self.offset is not None,
            "location": self.location,
            "concat": self.info.concat,
            "response": None if self.info.response is None else vars(self.info.response),
            "sequence": self.info.sequence,
            "events": [
                {
                    "id": event.id,
                    "event": event.type.value,
                    "transport": event.transport,
                    "attempts": event.attempts,
                    "due_at": None if event.dead else event.due_at,
                    "error": event.error,
                }
                for event in self.events
            ],
        }


def remove(uploads: Uploads, id: str) -> str | None:
    """Remove an upload as a DELETE does, regardless of its owner.

    :returns: why it could not be removed, ``None`` if it was.
    """
    try:
        uploads.remove(id)
    except TusError as error:
        return str(error)
    return None


def _fields(info: FileInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "state": info.state.value,
        "kind": Kind.of(info).value,
        "size": info.size,
        "offset": info.offset,
        "owner": info.owner,
        "metadata": {key: info.metadata.text(key) for key in info.metadata},
        "parts": list(info.partial_uploads),
        "storage": info.storage.type,
        "path": info.storage.path,
        "created_at": info.created_at,
        "last_byte_at": info.last_byte_at,
        "expires_at": info.expires_at,
        "finished_at": info.finished_at,
        "deleted_at": info.deleted_at,
    }


def _row(info: FileInfo, now: float) -> tuple[str, ...]:
    return (
        info.id,
        info.state.value,
        Kind.of(info).value,
        "deferred" if info.size is None else str(info.size),
        str(info.offset),
        span(now - info.created_at),
        info.owner or "",
        info.metadata.text("filename") or info.metadata.text("name") or "",
    )


def _lines(name: str, value: Any) -> list[str]:
    """Return the lines of a field; a nested field has lines of its own."""
    head = f"{name}:".ljust(14)
    if isinstance(value, Mapping) and value:
        return [f"{name}:", *(f"  {printable(f'{key}: {text}')}" for key, text in value.items())]
    if name == "events" and value:
        return ["events:", *(f"  {printable(_event(event))}" for event in value)]
    if isinstance(value, list):
        return [f"{head} {' '.join(value)}".rstrip()]
    if name.endswith("_at") and value is not None:
        ahead = value > time.time()
        since = span(abs(time.time() - value))
        when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(value))
        return [f"{head} {when} ({f'in {since}' if ahead else f'{since} ago'})"]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return [f"{head} {'' if value is None else printable(str(value))}".rstrip()]


def _event(event: Mapping[str, Any]) -> str:
    state = "given up" if event["due_at"] is None else "pending"
    error = f": {event['error']}" if event["error"] else ""
    return (
        f"{event['event']} by {event['transport']}, {state}, "
        f"{event['attempts']} attempts{error} ({event['id']})"
    )
