"""Cross-origin requests: the headers that browsers ask for (the Fetch standard).

Every response has them, errors too: without them a script cannot even see the status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuswsgi.web.headers import REQUEST_HEADERS, RESPONSE_HEADERS
from tuswsgi.web.settings import WebSettings, origin_pattern

_METHODS = "GET, HEAD, POST, PATCH, DELETE, OPTIONS"

_ALLOWED = (
    "Authorization",
    "Content-Type",
    "Origin",
    "Range",
    "If-Range",
    "X-Requested-With",
    "X-Request-ID",
    *REQUEST_HEADERS,
)

_EXPOSED = (
    "Location",
    "Retry-After",
    "Content-Disposition",
    "Content-Range",
    "Accept-Ranges",
    "ETag",
    "X-Request-ID",
    *RESPONSE_HEADERS,
)


class Cors:
    """The CORS headers of one server."""

    def __init__(self, settings: WebSettings) -> None:
        self._any_origin = "*" in settings.cors
        self._origins = [origin_pattern(origin) for origin in settings.cors]
        #: The headers of responses to requests without an origin. They tell caches that responses
        #: depend on it.
        self.without_origin = [("Vary", "Origin")] if settings.cors else []
        self._common = [
            ("Access-Control-Expose-Headers", ", ".join((*_EXPOSED, *settings.cors_expose_headers)))
        ]
        if settings.cors_credentials:
            self._common.append(("Access-Control-Allow-Credentials", "true"))
        self._preflight = [
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Allow-Headers", ", ".join((*_ALLOWED, *settings.cors_allow_headers))),
            ("Access-Control-Max-Age", str(int(settings.cors_max_age))),
        ]

    def headers(self, environ: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
        """Return the headers of the response to a request that names its origin."""
        if not self._origins or not self.allows(origin):
            return self.without_origin
        headers = [*self.without_origin, ("Access-Control-Allow-Origin", origin), *self._common]
        if "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
            headers += self._preflight
        return headers

    def allows(self, origin: str) -> bool:
        """Return whether scripts of `origin` may use this server."""
        return self._any_origin or any(
            pattern.fullmatch(origin.lower()) for pattern in self._origins
        )
