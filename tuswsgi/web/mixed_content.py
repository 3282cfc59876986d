"""Warns when browsers may refuse the URL of a new upload.

A page of https may not send requests to an http URL (mixed content). Usually the reason is a proxy
that terminates TLS and is not trusted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.display import printable
from tuswsgi.web.settings import WebSettings
from tuswsgi.web.urls import is_trusted

log = logging.getLogger(__name__)

#: The seconds between two warnings, at least.
_PAUSE = 600.0

#: The most characters that are shown of a URL.
_SHOWN = 200


class MixedContentWatch:
    """Compares each ``Location`` with the ``Origin`` of the page that created the upload."""

    def __init__(self, settings: WebSettings) -> None:
        self._settings = settings
        self._silent_until = 0.0

    def check_location(self, environ: Mapping[str, Any], location: str) -> None:
        """Warn if a page served over https gets an http URL."""
        origin: str = environ.get("HTTP_ORIGIN", "")
        if not origin.startswith("https:") or not location.startswith("http:"):
            return
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + _PAUSE
            log.warning(
                "A page of %s got the Location %s, which browsers may refuse (not https): %s",
                printable(origin[:_SHOWN]),
                printable(location[:_SHOWN]),
                self._reason(environ),
            )

    def _reason(self, environ: Mapping[str, Any]) -> str:
        settings = self._settings
        peer = environ.get("REMOTE_ADDR") or "unix"
        if settings.public_url is not None:
            return "public_url is an http URL"
        if not settings.behind_proxy:
            return "if a proxy serves https, set behind_proxy or public_url"
        if not is_trusted(environ.get("REMOTE_ADDR", ""), settings.trusted_proxies):
            return f"the peer {peer} is not one of trusted_proxies"
        return f"the proxy {peer} does not send X-Forwarded-Proto: https"
