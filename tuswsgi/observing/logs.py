"""The format of the log, as text and as JSON, and the request that a line belongs to.

The current request of a greenlet or a thread is its WSGI environ, a new one for each request. The
ids that lines show are kept there; the id of a request is made when a line first needs it.

``LogHandler`` is the server's own handler. Where no other handler listens to a logger, its lines
can be written without a ``LogRecord``, and those of one iteration of gevent's event loop in one
call: a log line is a seventh of the work of a small request otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime, timezone
from enum import Enum
from typing import Any, TextIO

from tuswsgi.core.display import without_controls
from tuswsgi.core.process import is_cooperative

#: The environ of the request that this greenlet or thread serves, ``None`` between requests.
current_request: ContextVar[MutableMapping[str, Any] | None] = ContextVar(
    "tuswsgi_request", default=None
)

#: Keys of the environ: the ids of the request and of the upload, and the client's address as
#: trusted proxies tell it.
REQUEST_ID = "tuswsgi.request_id"
UPLOAD_ID = "tuswsgi.upload_id"
CLIENT = "tuswsgi.client"

# A client's id goes into logs and headers, so it must not end a line.
_SANE_ID = re.compile(r"[!-~]{1,128}")


class LogFormat(str, Enum):
    """The format of log lines."""

    TEXT = "text"
    JSON = "json"


def request_id(environ: MutableMapping[str, Any]) -> str:
    """Return a request's id: the client's ``X-Request-ID`` if it is printable, or a new one."""
    id: str | None = environ.get(REQUEST_ID)
    if id is None:
        id = environ.get("HTTP_X_REQUEST_ID", "")
        if _SANE_ID.fullmatch(id) is None:
            id = os.urandom(8).hex()
        environ[REQUEST_ID] = id
    return id


def request_fields() -> dict[str, Any]:
    """Return the ids and the client of the current request, for a log line or a report."""
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
    """Lines of text with the request's id at the end, without control characters."""

    def __init__(self) -> None:
        super().__init__()
        self._time = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return self.line(record.created, record.process, record.levelname, record.message)

    def line(self, created: float, process: int | None, level: str, message: str) -> str:
        """Return a line about the current request.

        :param created: in seconds since the epoch.
        """
        second = int(created)
        if self._time[0] != second:
            self._time = (second, time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(second)))
        line = f"[{self._time[1]}] [{process}] [{level}] {message}"
        environ = current_request.get()
        return line if environ is None else f"{line} [{request_id(environ)}]"


#: The attributes of every record; others were given to one with ``extra``.
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


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes the log to stderr."""

    def __init__(self) -> None:
        super().__init__()
        #: Lines of this iteration of the event loop that are not written yet.
        self._pending: deque[str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        self._write_pending()
        super().emit(record)

    def flush(self) -> None:
        # Also called when the interpreter exits.
        self._write_pending()
        super().flush()

    def emit_line(self, level: int, message: str) -> None:
        """Log a message without a ``LogRecord``, if this is the ``sole_handler`` of a logger.

        It is called by what serves a request, and not in gevent's native threads.
        """
        assert isinstance(self.formatter, TextFormatter)
        name = logging.getLevelName(level)
        line = self.formatter.line(time.time(), os.getpid(), name, message)
        if not line.isprintable():
            line = without_controls(line)
        self._pending.append(line + self.terminator)
        if not is_cooperative():
            assert self.lock is not None  # since createLock
            with self.lock:
                self._write_pending()
        elif level > logging.INFO:
            self._write_pending()
        elif len(self._pending) == 1:
            from gevent import get_hub

            get_hub().loop.run_callback(self._write_pending)

    def _write_pending(self) -> None:
        lines = []
        with suppress(IndexError):
            while True:
                lines.append(self._pending.popleft())
        # A stream that is full or closed leaves nowhere to report that.
        with suppress(OSError, ValueError):
            if lines:
                self.stream.write("".join(lines))
                self.stream.flush()


def sole_handler(logger: logging.Logger) -> LogHandler | None:
    """Return our handler if a record of this logger would reach no other one and no filter."""
    sole: LogHandler | None = None
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            if sole is not None or not isinstance(handler, LogHandler):
                return None
            if handler.filters or handler.level:
                return None
            sole = handler
        if at.filters and at is logger:
            return None
        at = at.parent if at.propagate else None
    is_text = sole is not None and type(sole.formatter) is TextFormatter
    return sole if is_text and logging.getLogRecordFactory() is logging.LogRecord else None


def formatter(format: LogFormat) -> logging.Formatter:
    """Return the formatter for a format."""
    return JsonFormatter() if format is LogFormat.JSON else TextFormatter()


def _iso(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
