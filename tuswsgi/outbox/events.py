"""Turns a post-hook into an event and back.

An event holds the upload and the request, not the payload of some format, so that it is sent
in whatever format is configured when its turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuswsgi.core.events import Event, RequestInfo, joined
from tuswsgi.hooks.base import HookRequest
from tuswsgi.infostores import record


def event_of(hook: HookRequest, transport: str, now: float) -> Event:
    """Return the event that makes `transport` send `hook`.

    :param now: the time, in seconds since the epoch.
    """
    request = hook.request
    payload = {
        "upload": record.dump(hook.info),
        "location": hook.location,
        "request": {
            "method": request.method,
            "uri": request.uri,
            "remote_addr": request.remote_addr,
            "remote_port": request.remote_port,
            # One value per header, text or list: headers may be long.
            "headers": {**request.headers, **request.repeated},
            "owner": request.owner,
        },
    }
    return Event(hook.id, hook.type, hook.info.id, hook.sequence, now, transport, payload)


def request_of(event: Event) -> HookRequest:
    """Return the post-hook that ``event_of`` was given.

    :raises CorruptRecord: if the payload is invalid.
    """
    try:
        info = record.load(event.payload["upload"])
        request: Mapping[str, Any] = event.payload["request"]
        return HookRequest(
            event.type,
            info,
            _request_info(**request),
            event.payload["location"],
            event.id,
            event.sequence,
        )
    except (KeyError, TypeError) as error:
        raise record.CorruptRecord(f"Not the payload of an event: {error!r}") from error


def _request_info(headers: Mapping[str, str | Sequence[str]], **others: Any) -> RequestInfo:
    texts = {}
    repeated = {}
    for name, value in headers.items():
        if isinstance(value, str):
            texts[name] = value
        else:
            repeated[name] = tuple(value)
            texts[name] = joined(name, value)
    return RequestInfo(headers=texts, repeated=repeated, **others)
