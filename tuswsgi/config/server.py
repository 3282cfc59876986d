"""The settings of the server: how it listens, works and logs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from marshmallow.validate import Range, Regexp

from tuswsgi.core.options import Duration, KiB, MiB, Size, option
from tuswsgi.observing.logs import LogFormat
from tuswsgi.web.settings import MONITORING_PATHS


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
        rf"(?!/*({'|'.join(path.strip('/') for path in MONITORING_PATHS)})/*\Z)",
        error="This path is taken by the server itself.",
    ),
)


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens, works and logs."""

    host: str = option(
        "0.0.0.0",
        "The address to listen on; `0.0.0.0` stands for all addresses of the host.",
        rustus="SERVER_HOST",
    )
    port: int = option(
        1081,
        "The port to listen on; 0 for any free one.",
        rustus="SERVER_PORT",
        validate=Range(0, 65535, error="Not a port between 0 and 65535."),
    )
    url: str = option(
        "/files", "The path below which uploads are served.", rustus="URL", validate=_PATH
    )
    unix_sock: Path | None = option(
        None, "The path of a unix socket to listen on instead of host and port."
    )
    certfile: Path | None = option(None, "A certificate (PEM); with it the server speaks https.")
    keyfile: Path | None = option(
        None, "The private key of the certificate (PEM). Unset: it is in `certfile`."
    )
    workers: int | None = option(
        None,
        "The number of worker processes. Unset: one for each processor, or a single one if a "
        "backend keeps its state in memory.",
        rustus="WORKERS",
        short="w",
        validate=_AT_LEAST_ONE,
    )
    worker_connections: int = option(
        10_000, "The maximum number of connections of one worker.", validate=_AT_LEAST_ONE
    )
    max_head_size: int = option(
        128 * KiB,
        "The maximum size of a request's first line and headers together; a longer head is "
        "refused (431). A single header may take half of it, which is enough for an "
        "`Upload-Concat` with 1,000 parts.",
        kind=Size,
        validate=Range(2 * LONGEST_LINE, MiB, error="Not a size between 16380 bytes and 1MiB."),
    )
    graceful_timeout: float = option(
        30.0,
        "How long a worker may take to finish its requests when it is stopped.",
        kind=Duration,
        validate=_AT_LEAST_ONE,
    )
    reuse_port: bool = option(
        False, "Give each worker a listening socket of its own (SO_REUSEPORT)."
    )
    log_level: LogLevel = option(
        LogLevel.INFO, "The lowest level that is logged (also rustus' `WARN`).", rustus="LOG_LEVEL"
    )
    log_format: LogFormat = option(
        LogFormat.TEXT, "Whether a line of the log is text or a JSON object."
    )
    access_log: bool = option(False, "Log each request to the standard output.")
    disable_health_access_log: bool = option(
        False,
        "Leave requests to `/health`, `/ready` and `/metrics` out of the access log.",
        rustus="DISABLE_HEALTH_ACCESS_LOG",
    )
