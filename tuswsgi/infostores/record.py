"""The JSON of records and events, for all stores that keep text.

It does not use marshmallow: every request reads a record, and a schema would take five times
as long to validate what this server wrote itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import FileInfo, FinalResponse, Metadata, State, Storage

#: ``json.dumps`` with arguments would build an encoder for each call.
_encoder = json.JSONEncoder(separators=(",", ":"))
_decoder = json.JSONDecoder()

_DEFAULTS = vars(FileInfo(id=""))
_EVENT_FIELDS = [field.name for field in fields(Event)]


class CorruptRecord(ValueError):
    """A text that this server did not write."""


def encode(data: Mapping[str, Any]) -> str:
    """Return JSON of one line, in ASCII."""
    return _encoder.encode(data)


def decode(text: str | bytes) -> dict[str, Any]:
    """Return the object that ``encode`` was given.

    :raises CorruptRecord: if `text` is not a JSON object.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        data, end = _decoder.raw_decode(text)
    except ValueError as error:
        raise CorruptRecord(f"Not JSON: {error}") from error
    if not isinstance(data, dict) or text[end:].strip():
        raise CorruptRecord("Not a JSON object.")
    return data


def dump(info: FileInfo) -> dict[str, Any]:
    """Return a record as a JSON object, without the fields that have their default."""
    data = {name: value for name, value in vars(info).items() if value is not _DEFAULTS[name]}
    data["storage"] = {
        "type": info.storage.type,
        "path": info.storage.path,
        "details": dict(info.storage.details),
    }
    data["metadata"] = info.metadata.raw
    data["state"] = info.state.value
    data["offset"] = info.offset
    data["sequence"] = info.sequence
    if info.response is not None:
        data["response"] = _dump_response(info.response)
    return data


def load(data: Mapping[str, Any]) -> FileInfo:
    """Return the record that ``dump`` was given.

    Missing fields get their defaults and unknown ones are ignored, so that two versions of the
    server can read each other's records during an update.

    :raises CorruptRecord: if `data` is invalid.
    """
    try:
        get = data.get
        storage = get("storage") or {}
        response = get("response")
        return FileInfo.restored(
            {
                "id": data["id"],
                "size": get("size"),
                "offset": data["offset"],
                "metadata": Metadata(get("metadata", "")),
                "is_partial": get("is_partial", False),
                "is_final": get("is_final", False),
                "concat": get("concat"),
                "partial_uploads": tuple(get("partial_uploads", ())),
                "storage": Storage(
                    storage.get("type", ""), storage.get("path"), storage.get("details", {})
                ),
                "owner": get("owner"),
                "state": State(data["state"]),
                "response": None if response is None else _load_response(response),
                "reserved": get("reserved", 0),
                "created_at": get("created_at", 0.0),
                "last_byte_at": get("last_byte_at"),
                "expires_at": get("expires_at"),
                "finished_at": get("finished_at"),
                "deleted_at": get("deleted_at"),
                "sequence": data["sequence"],
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptRecord(f"Not a record of an upload: {error!r}") from error


def dump_event(event: Event) -> dict[str, Any]:
    """Return an event as a JSON object."""
    return {**vars(event), "type": event.type.value, "payload": dict(event.payload)}


def load_event(data: Mapping[str, Any]) -> Event:
    """Return the event that ``dump_event`` was given.

    :raises CorruptRecord: if `data` is invalid.
    """
    try:
        values = {name: data[name] for name in _EVENT_FIELDS if name in data}
        return Event(**{**values, "type": HookType(data["type"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptRecord(f"Not an event of an upload: {error!r}") from error


def _dump_response(response: FinalResponse) -> dict[str, Any]:
    return {
        "status": response.status,
        "body": response.body,
        "headers": dict(response.headers),
    }


def _load_response(data: Mapping[str, Any]) -> FinalResponse:
    return FinalResponse(data.get("status"), data.get("body", ""), data.get("headers", {}))
