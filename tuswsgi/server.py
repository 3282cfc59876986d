"""How the server is run: its settings, and what gunicorn is told because of them.

``gunicorn_settings`` is the one source of that for ``tuswsgi serve`` and for
``conf/gunicorn.conf.py``. This file never imports gunicorn: the reference needs the
settings, and a host application its workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from marshmallow import ValidationError

from tuswsgi.options import Duration, option


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


def _port(value: int) -> None:
    if not 0 <= value <= 65535:
        raise ValidationError("Not a port between 0 and 65535.")


def _positive(value: float) -> None:
    if value < 1:
        raise ValidationError("Not a number of 1 or more.")


@dataclass(frozen=True)
class ServerSettings:
    """How the server listens, works and logs."""

    host: str = option("0.0.0.0", "The address to listen at.", rustus="SERVER_HOST")
    port: int = option(
        1081, "The port to listen at; 0 for any.", rustus="SERVER_PORT", validate=_port
    )
    url: str = option("/files", "The path of uploads.", rustus="URL")
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
        validate=_positive,
    )
    worker_connections: int = option(
        10_000, "How many connections one worker may have at once.", validate=_positive
    )
    graceful_timeout: float = option(
        30.0,
        "How long a worker that was told to stop may take to end its requests.",
        kind=Duration,
        validate=_positive,
    )
    reuse_port: bool = option(
        False, "Give each worker a listening socket of its own (SO_REUSEPORT)."
    )
    log_level: LogLevel = option(
        LogLevel.INFO, "How much is logged (also rustus' `WARN`).", rustus="LOG_LEVEL"
    )
    access_log: bool = option(False, "Log a line for each request to the standard output.")
    disable_health_access_log: bool = option(
        False,
        "Log no such line for requests to `/health`.",
        rustus="DISABLE_HEALTH_ACCESS_LOG",
    )
