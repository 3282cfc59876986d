"""Reports errors to Sentry: what is logged at ERROR, and every traceback in the log.

Each worker has its own client, made after the fork. A report has the ids of the request and
the upload and a traceback, and neither bodies nor headers nor values of variables.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from marshmallow.validate import Range

from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import option
from tuswsgi.core.version import installed_version
from tuswsgi.observing.logs import request_fields

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

#: How long a worker waits for its last reports when it stops (seconds).
_FLUSH_TIME = 5.0

#: The root logger, and the one that does not propagate to it.
_LOGGERS = (None, "gunicorn.error")


@dataclass(frozen=True)
class SentrySettings:
    """Reports of errors to Sentry."""

    section: ClassVar[str] = "sentry"

    dsn: str | None = option(
        None,
        "The Sentry project that errors are reported to. Needs `tuswsgi-server[sentry]`.",
        rustus="SENTRY_DSN",
        secret=True,
    )
    sample_rate: float = option(
        1.0,
        "The fraction of errors that are reported, from 0 to 1.",
        rustus="SENTRY_SAMPLE_RATE",
        validate=Range(0, 1, error="Not a number between 0 and 1."),
    )


def check(settings: SentrySettings) -> None:
    """Check that reports could be sent.

    :raises ConfigurationError: if sentry-sdk is missing or the DSN is invalid.
    """
    if settings.dsn is None:
        return
    try:
        from sentry_sdk.utils import BadDsn, Dsn
    except ImportError as error:
        text = "Reports to Sentry need sentry-sdk: pip install 'tuswsgi-server[sentry]'"
        raise ConfigurationError(text) from error
    try:
        Dsn(settings.dsn)
    except BadDsn:
        # Its message may quote the DSN, which is a secret.
        raise ConfigurationError("[sentry] dsn: Not a Sentry DSN.") from None


def start(settings: SentrySettings) -> None:
    """Report the errors that this process logs from now on, if a DSN is set."""
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
        release=f"tuswsgi@{installed_version()}",
        # The others would read requests, and trace calls of libraries.
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
    """Send the remaining reports, for up to ``_FLUSH_TIME``."""
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
