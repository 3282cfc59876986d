"""Records and events as JSON, in one form for every store that keeps text.

This file owns the form and nothing else: where the text is kept, and what is to be done
about text that cannot be read, is the business of the stores. It does not use
marshmallow: the text is our own and is read on every request, and a schema takes five
times as long to check what no client ever touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import FileInfo, FinalResponse, Metadata, State, Storage

#: Built once: ``json.dumps`` with arguments builds an encoder for each call.
_encoder = json.JSONEncoder(separators=(",", ":"))
_decoder = json.JSONDecoder()

_DEFAULTS = vars(FileInfo(id=""))


class CorruptRecord(ValueError):
    """A text that is no record of this server."""


def encode(data: Mapping[str, Any]) -> str:
    """Return JSON of one line, in ASCII."""
    return _encoder.encode(data)


def decode(text: str | bytes) -> dict[str, Any]:
    """Return the object that ``encode`` was given.

    :raises CorruptRecord: if `text` is not a JSON object.
    """
    try:
        # What ``encode`` returned begins with the object, so nothing is skipped before it.
        text = text if isinstance(text, str) else text.decode()
        data, end = _decoder.raw_decode(text)
    except ValueError as error:
        raise CorruptRecord(f"Not JSON: {error}") from error
    if not isinstance(data, dict) or text[end:].strip():
        raise CorruptRecord("Not a JSON object.")
    return data


def dump(info: FileInfo) -> dict[str, Any]:
    """Return a record as values that JSON knows, without fields that have their default."""
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

    Fields that are missing have their defaults and unknown ones are ignored, so that
    neighbouring versions of the server read each other's records.

    :raises CorruptRecord: if `data` is something else.
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
                "digest": get("digest"),
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
    """Return an event as values that JSON knows."""
    return {
        "id": event.id,
        "type": event.type.value,
        "upload": event.upload,
        "sequence": event.sequence,
        "created_at": event.created_at,
        "transport": event.transport,
        "payload": dict(event.payload),
        "due_at": event.due_at,
        "attempts": event.attempts,
        "error": event.error,
        "dead": event.dead,
    }


def load_event(data: Mapping[str, Any]) -> Event:
    """Return the event that ``dump_event`` was given.

    :raises CorruptRecord: if `data` is something else.
    """
    try:
        return Event(
            id=data["id"],
            type=HookType(data["type"]),
            upload=data["upload"],
            sequence=data["sequence"],
            created_at=data["created_at"],
            transport=data.get("transport", ""),
            payload=data.get("payload", {}),
            due_at=data.get("due_at", 0.0),
            attempts=data.get("attempts", 0),
            error=data.get("error"),
            dead=data.get("dead", False),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptRecord(f"Not an event of an upload: {error!r}") from error


def _dump_response(response: FinalResponse) -> dict[str, Any]:
    return {
        "status": response.status,
        "body": response.body,
        "headers": dict(response.headers),
    }


def _load_response(data: Mapping[str, Any]) -> FinalResponse:
    return FinalResponse(data.get("status"), data.get("body", ""), data.get("headers", {}))
