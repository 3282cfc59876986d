"""gunicorn's log and access log, in the format of the server's log.

gunicorn makes one of these classes by its name, which therefore implies the format. At a reload
it keeps its logger and calls ``setup`` with the new class in its settings.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from gunicorn.glogging import Logger

from tuswsgi.core.display import printable
from tuswsgi.observing.logs import CLIENT, LogFormat, current_request, formatter


class TextLog(Logger):  # type: ignore[misc]  # gunicorn has no types
    """Lines of text. The access log is in an extended form of Apache's combined format."""

    format = LogFormat.TEXT

    def setup(self, cfg: Any) -> None:
        self._format: LogFormat = getattr(cfg.logger_class, "format", LogFormat.TEXT)
        super().setup(cfg)

    def _set_handler(self, log: logging.Logger, *args: Any, **kwargs: Any) -> None:
        super()._set_handler(log, *args, **kwargs)
        handler = self._get_gunicorn_handler(log)
        is_apaches = log is self.access_log and self._format is LogFormat.TEXT
        if handler is not None and not is_apaches:
            handler.setFormatter(formatter(self._format))

    def access(self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta) -> None:
        if self._format is LogFormat.TEXT:
            super().access(resp, req, environ, request_time)
            return
        if not self.access_log_enabled:
            return
        fields = _fields(resp, environ, request_time)
        line = f"{fields['method']} {fields['path']}: {fields['status']}"
        # Other applications than ours do not set the current request.
        token = current_request.set(environ)
        try:
            self.access_log.info("%s", line, extra=fields)
        finally:
            current_request.reset(token)

    def atoms(
        self, resp: Any, req: Any, environ: dict[str, Any], request_time: timedelta
    ) -> dict[str, Any]:
        atoms: dict[str, Any] = super().atoms(resp, req, environ, request_time)
        atoms["h"] = environ.get(CLIENT) or atoms["h"]
        # Queries may hold tokens.
        target = environ["RAW_URI"].partition("?")[0]
        atoms["r"] = f"{environ['REQUEST_METHOD']} {target} {environ['SERVER_PROTOCOL']}"
        # Clients choose most of them. JSON escapes its own.
        return {
            name: printable(value) if isinstance(value, str) else value
            for name, value in atoms.items()
        }


class JsonLog(TextLog):
    """JSON objects. Those of the access log have the fields of the line of text."""

    format = LogFormat.JSON


def _fields(resp: Any, environ: dict[str, Any], request_time: timedelta) -> dict[str, Any]:
    return {
        "method": environ.get("REQUEST_METHOD"),
        "path": environ.get("RAW_URI", "").partition("?")[0],
        "protocol": environ.get("SERVER_PROTOCOL"),
        "status": int(str(resp.status).partition(" ")[0]),
        "bytes_sent": getattr(resp, "sent", None),
        "duration": request_time.total_seconds(),
        "referer": environ.get("HTTP_REFERER"),
        "user_agent": environ.get("HTTP_USER_AGENT"),
    }
