"""The settings of the server: how it listens, works and logs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from marshmallow.validate import Range, Regexp

from tuswsgi.core.options import Duration, KiB, MiB, Size, option
from tuswsgi.observing.logs import LogFormat
from tuswsgi.web.settings import WATCHED


class LogLevel(str, Enum):
    """How much is logged: rustus' levels and Python's."""

    OFF = "off"
    CRITICAL = "critical"
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"
    TRACE = "trace"

    @classmethod
    def _missing_(cls, value: object) -> LogLevel | None:
        return cls.WARNING if value == "warn" else None


#: The longest first line of a request that gunicorn takes, in bytes.
LONGEST_LINE = 8190

_AT_LEAST_ONE = Range(min=1)

_PATH = (
    Regexp(r"[A-Za-z0-9._~/-]*\Z", error="Not a path such as /files."),
    Regexp(
        rf"(?!/*({'|'.join(path.strip('/') for path in WATCHED)})/*\Z)",
        error="This path is taken by the server itself.",
    ),
)


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens, works and logs."""

    host: str = option("0.0.0.0", "The address to listen at.", rustus="SERVER_HOST")
    port: int = option(
        1081,
        "The port to listen at; 0 for any.",
        rustus="SERVER_PORT",
        validate=Range(0, 65535, error="Not a port between 0 and 65535."),
    )
    url: str = option("/files", "The path of uploads.", rustus="URL", validate=_PATH)
    unix_sock: Path | None = option(
        None, "The path of a unix socket to listen at, instead of host and port."
    )
    certfile: Path | None = option(None, "A certificate (PEM) to serve https with.")
    keyfile: Path | None = option(
        None, "The private key of the certificate, unless `certfile` has it too."
    )
    workers: int | None = option(
        None,
        "How many processes serve. Unset: one for each processor, or one alone if a backend "
        "keeps its state in memory.",
        rustus="WORKERS",
        short="w",
        validate=_AT_LEAST_ONE,
    )
    worker_connections: int = option(
        10_000, "How many connections one worker may have at once.", validate=_AT_LEAST_ONE
    )
    max_head_size: int = option(
        128 * KiB,
        "The most bytes of a request's head, its first line and all header fields together; a "
        "longer one is refused (431). One field alone may have half of that, "
        "which is enough for an `Upload-Concat` with 1,000 parts.",
        kind=Size,
        validate=Range(2 * LONGEST_LINE, MiB, error="Not a size between 16380 bytes and 1MiB."),
    )
    graceful_timeout: float = option(
        30.0,
        "How long a worker that was told to stop may take to end its requests.",
        kind=Duration,
        validate=_AT_LEAST_ONE,
    )
    reuse_port: bool = option(
        False, "Give each worker a listening socket of its own (SO_REUSEPORT)."
    )
    log_level: LogLevel = option(
        LogLevel.INFO, "How much is logged (also rustus' `WARN`).", rustus="LOG_LEVEL"
    )
    log_format: LogFormat = option(
        LogFormat.TEXT, "Lines of text, or one JSON object on each line."
    )
    access_log: bool = option(False, "Log a line for each request to the standard output.")
    disable_health_access_log: bool = option(
        False,
        "Log no such line for requests to `/health`, `/ready` and `/metrics`.",
        rustus="DISABLE_HEALTH_ACCESS_LOG",
    )
