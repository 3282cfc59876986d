"""How lines of the log look, as text and as JSON, and which request they belong to.

The request that a greenlet or a thread works at is its WSGI environ, which every WSGI server
makes anew for each request: what a line tells of it is put there, and the request's id is made
when a line first wants it. This file owns no logger and writes no line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from tuswsgi.core.display import without_controls

#: The environ of the request that is being served here, ``None`` between requests.
current_request: ContextVar[MutableMapping[str, Any] | None] = ContextVar(
    "tuswsgi_request", default=None
)

#: Keys of the environ: the request's id, the upload's, and the client's address with trusted
#: proxies looked through.
REQUEST_ID = "tuswsgi.request_id"
UPLOAD_ID = "tuswsgi.upload_id"
CLIENT = "tuswsgi.client"

# What a client sends goes into logs and headers: nothing that could end a line.
_SANE_ID = re.compile(r"[!-~]{1,128}")


class LogFormat(str, Enum):
    """How lines of the log look."""

    TEXT = "text"
    JSON = "json"


def request_id(environ: MutableMapping[str, Any]) -> str:
    """Return a request's id: the client's ``X-Request-ID`` if it can be shown, or a new one."""
    id: str | None = environ.get(REQUEST_ID)
    if id is None:
        id = environ.get("HTTP_X_REQUEST_ID", "")
        if _SANE_ID.fullmatch(id) is None:
            id = os.urandom(8).hex()
        environ[REQUEST_ID] = id
    return id


def request_fields() -> dict[str, Any]:
    """Return what is known of the current request, for a line or a report."""
    environ = current_request.get()
    if environ is None:
        return {}
    fields = {
        "request_id": request_id(environ),
        "upload_id": environ.get(UPLOAD_ID),
        "client": environ.get(CLIENT) or environ.get("REMOTE_ADDR"),
    }
    return {name: value for name, value in fields.items() if value}


class TextFormatter(logging.Formatter):
    """Lines for people, with the id of the request at their end, that no terminal obeys."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(process)d] [%(levelname)s] %(message)s")
        self._time = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        second = int(record.created)
        if self._time[0] != second:
            self._time = (second, time.strftime("[%Y-%m-%d %H:%M:%S %z]", time.localtime(second)))
        return self._time[1]

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        environ = current_request.get()
        return line if environ is None else f"{line} [{request_id(environ)}]"


#: What every record has; whatever else one has was given to it with ``extra``.
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Lines for machines: one JSON object each, in ASCII.

    A record's ``extra`` are fields of the object.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **request_fields(),
        }
        for name, value in vars(record).items():
            if name not in _OF_EVERY_RECORD and value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def formatter(format: LogFormat) -> logging.Formatter:
    """Return what makes lines of a format."""
    return JsonFormatter() if format is LogFormat.JSON else TextFormatter()


def _iso(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
