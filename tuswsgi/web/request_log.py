"""The log line of a request for an upload, written once its response is known.

The level is INFO for requests that send bytes, create or terminate an upload, also if they break
off; DEBUG for those that change nothing; WARNING for errors of the server. Lines have no header
but the offset, no metadata and no query, since these may hold secrets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.display import printable
from tuswsgi.core.errors import (
    BodyIncomplete,
    MethodNotAllowed,
    ReadTimeout,
    ServerShutdown,
    StorageFull,
    TusError,
    UnsupportedVersion,
    UploadNotFound,
    is_temporary,
)
from tuswsgi.observing.logs import CLIENT, UPLOAD_ID, sole_handler
from tuswsgi.transfer.body import RequestBody
from tuswsgi.web.urls import request_uri

log = logging.getLogger(__name__)

#: Methods that change nothing.
_SAFE = ("HEAD", "OPTIONS", "GET")

#: Errors that are normal for resumable uploads, and at a deployment.
_NORMAL = (BodyIncomplete, ReadTimeout, ServerShutdown)

#: Errors of clients that try URLs at random.
_SCANNING = (UploadNotFound, MethodNotAllowed, UnsupportedVersion)

#: The most characters that are shown of a text from outside.
_SHOWN = 200


def log_answer(
    environ: Mapping[str, Any],
    method: str,
    status: int,
    body: RequestBody | None,
    began: float,
    error: TusError | None = None,
) -> None:
    """Log a request and its response.

    :param began: when the request began, on the monotonic clock.
    :param error: the error that is the response, if any.
    """
    if error is not None and error.status >= 500 and not isinstance(error, _NORMAL):
        level = logging.WARNING
    elif body is not None and body.length != 0:
        level = logging.INFO
    else:
        level = logging.DEBUG if method in _SAFE or isinstance(error, _SCANNING) else logging.INFO
    if log.isEnabledFor(level):
        cause = None if error is None or level != logging.WARNING else error.__cause__
        fields = _fields(environ, method, status, body, began, error)
        # A traceback does not help with a full or broken disk.
        if isinstance(cause, OSError) and is_temporary(cause):
            fields["reason"] += f" {_shown(str(cause))}"
            cause = None
        _write(level, fields, None if isinstance(error, StorageFull) else cause)


def log_failure(
    environ: Mapping[str, Any],
    method: str,
    status: int,
    body: RequestBody | None,
    began: float,
    error: Exception,
) -> None:
    """Log a request that failed because of a bug, with the traceback."""
    _write(logging.ERROR, _fields(environ, method, status, body, began), error)


def _fields(
    environ: Mapping[str, Any],
    method: str,
    status: int,
    body: RequestBody | None,
    began: float,
    error: TusError | None = None,
) -> dict[str, Any]:
    """Return the fields of a line."""
    fields: dict[str, Any] = {
        "method": _shown(method),
        "path": _shown(request_uri(environ).partition("?")[0]),
        "status": status,
        "duration": round(time.monotonic() - began, 6),
        "upload_id": environ.get(UPLOAD_ID) or None,
        "client": environ.get(CLIENT) or environ.get("REMOTE_ADDR") or None,
    }
    if error is not None:
        fields |= {"code": error.code, "reason": _shown(error.message)}
    if body is not None and body.length != 0:
        offset = environ.get("HTTP_UPLOAD_OFFSET", "0")
        is_number = offset.isdecimal() and len(offset) < 20
        fields |= {"bytes": body.received, "offset": int(offset) if is_number else None}
    return fields


def _write(level: int, fields: dict[str, Any], cause: BaseException | None) -> None:
    line = f"{fields['method']} {fields['upload_id'] or fields['path']}: {fields['status']}"
    if "code" in fields:
        line += f" {fields['code']}"
    if "bytes" in fields:
        line += f", {fields['bytes']} bytes"
        if fields["offset"] is not None:
            line += f" at offset {fields['offset']}"
    line += f" in {fields['duration']:.2f} s from {fields['client'] or 'a unix socket'}"
    if "reason" in fields:
        line += f": {fields['reason']}"
    handler = None if cause is not None else sole_handler(log)
    if handler is not None:
        handler.emit_line(level, line)
    else:
        log.log(level, "%s", line, exc_info=cause, extra=fields)


def _shown(text: str) -> str:
    """Return the start of a text from outside on one line, without control characters."""
    text = " ".join(text[:_SHOWN].split())
    return text if text.isprintable() else printable(text)
