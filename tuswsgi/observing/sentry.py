"""Reports of errors to Sentry: what the log tells at ERROR, and every traceback in it.

Each worker has a client of its own, made after the fork. A report says which request and which
upload it is about and where in the code it happened; it carries no body, no header and no
values of variables.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar

from marshmallow.validate import Range

from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import option
from tuswsgi.observing.logs import request_fields

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

#: How long a worker that ends waits for its last reports (seconds).
_FLUSH_TIME = 5.0

#: Loggers that pass nothing on to the root logger.
_LOGGERS = (None, "gunicorn.error")


@dataclass(frozen=True)
class SentrySettings:
    """Reports of errors to Sentry."""

    section: ClassVar[str] = "sentry"

    dsn: str | None = option(
        None,
        "The project at Sentry that errors are reported to. Needs `tuswsgi[sentry]`.",
        rustus="SENTRY_DSN",
        secret=True,
    )
    sample_rate: float = option(
        1.0,
        "The share of errors that are reported, between 0 and 1.",
        rustus="SENTRY_SAMPLE_RATE",
        validate=Range(0, 1, error="Not a number between 0 and 1."),
    )


def check(settings: SentrySettings) -> None:
    """Look whether reports could be sent.

    :raises ConfigurationError: if sentry-sdk is missing or the DSN is none.
    """
    if settings.dsn is None:
        return
    try:
        from sentry_sdk.utils import BadDsn, Dsn
    except ImportError as error:
        text = "Reports to Sentry need sentry-sdk: pip install 'tuswsgi[sentry]'"
        raise ConfigurationError(text) from error
    try:
        Dsn(settings.dsn)
    except BadDsn:
        # What it says may quote the DSN.
        raise ConfigurationError("[sentry] dsn: Not a DSN of Sentry's.") from None


def start(settings: SentrySettings) -> None:
    """Begin to report what this process logs."""
    if settings.dsn is None:
        return
    import sentry_sdk
    from sentry_sdk.integrations.dedupe import DedupeIntegration
    from sentry_sdk.integrations.logging import EventHandler

    class Reporter(EventHandler):
        def filter(self, record: logging.LogRecord) -> bool:
            return record.levelno >= logging.ERROR or bool(record.exc_info)

    sentry_sdk.init(
        dsn=settings.dsn,
        sample_rate=settings.sample_rate,
        release=f"tuswsgi@{_version()}",
        # Others would look into requests, and into calls of every library.
        default_integrations=False,
        auto_enabling_integrations=False,
        integrations=[DedupeIntegration()],
        before_send=_about_request,
        include_local_variables=False,
        max_request_body_size="never",
        send_default_pii=False,
    )
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(Reporter(logging.WARNING))


def stop() -> None:
    """Send what has not been sent yet, for a moment. Nothing happens if nothing was begun."""
    if "sentry_sdk" in sys.modules:
        import sentry_sdk

        sentry_sdk.flush(_FLUSH_TIME)


def _about_request(event: Event, hint: Hint) -> Event:
    about = request_fields()
    tags = event.setdefault("tags", {})
    tags["pid"] = str(os.getpid())
    for name in ("request_id", "upload_id"):
        if name in about:
            tags[name] = about[name]
    return event


def _version() -> str:
    try:
        return version("tuswsgi")
    except PackageNotFoundError:
        return "unknown"
