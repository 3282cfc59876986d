"""Settings of URLs, proxies, CORS and monitoring."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from marshmallow import ValidationError
from marshmallow.validate import Regexp

from tuswsgi.core.options import MAIN, Duration, option


class LocationForm(str, Enum):
    """The form of the URL in ``Location``."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"


class Compat(str, Enum):
    """A server whose deviations from the specification clients rely on."""

    RUSTUS = "rustus"


#: The paths of the pages for monitoring. No upload has one of them.
HEALTH = "/health"
READY = "/ready"
METRICS = "/metrics"
MONITORING_PATHS = (HEALTH, READY, METRICS)

#: Stands for the peers of a unix socket, which have no addresses.
UNIX = "unix"


#: Origins that do not exist (RFC 6761, 6.4). A pattern that allows one of them allows all.
_STRANGERS = ("https://stranger.invalid", "http://stranger.invalid")


def origin_pattern(origin: str) -> re.Pattern[str]:
    """Return the pattern of an origin of ``cors``, in which ``*`` stands for any text."""
    return re.compile(".*".join(map(re.escape, origin.lower().split("*"))))


def _networks(values: tuple[str, ...]) -> None:
    for value in values:
        if value != UNIX:
            try:
                ipaddress.ip_network(value, strict=False)
            except ValueError:
                raise ValidationError(
                    f"{value} is neither an address, a network nor unix."
                ) from None


@dataclass(frozen=True)
class MonitoringSettings:
    """What `/health`, `/ready` and `/metrics` tell."""

    metrics: bool = option(
        False,
        "Serve metrics for Prometheus at `/metrics`, the sums of all workers. Needs "
        "`tuswsgi-server[metrics]`.",
    )
    ready_needs_hooks: bool = option(
        False, "Say at `/ready` that the server is not ready while the broker of hooks is away."
    )


@dataclass(frozen=True)
class WebSettings:
    """How requests are understood and URLs are written."""

    location: LocationForm = option(
        LocationForm.ABSOLUTE,
        "Whether the Location of a new upload is an absolute URL or only a path.",
    )
    public_url: str | None = option(
        None,
        "The URL under which clients reach the uploads, e.g. `https://example.org/files`. "
        "It overrides everything that requests and proxies say.",
        validate=Regexp(
            r"https?://[^?#]*\Z", error="Not an absolute http or https URL without query."
        ),
    )
    compat: Compat | None = option(
        None,
        "The server that clients are used to. With `rustus`, requests without Tus-Resumable are "
        "taken as rustus takes them; unset, they are refused with 412 as the specification says, "
        "downloads excepted.",
    )
    behind_proxy: bool = option(
        False,
        "Believe Forwarded and X-Forwarded-Proto, -Host, -Prefix and -For where they come "
        "from `trusted_proxies`.",
        rustus="BEHIND_PROXY",
    )
    trusted_proxies: tuple[str, ...] = option(
        (
            "127.0.0.0/8",
            "::1/128",
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "fc00::/7",
            UNIX,
        ),
        "Addresses and networks of proxies that may be believed; `unix` stands for the "
        "peers of a unix socket. Without `behind_proxy` no peer is trusted.",
        validate=_networks,
    )
    cors: tuple[str, ...] = option(
        ("*",),
        "Origins that browsers may upload from. `*` stands for any text in an origin, as in "
        "`https://*.example.org`.",
        rustus="CORS",
    )
    cors_credentials: bool = option(
        False,
        "Let browsers send cookies and other credentials from these origins, which must then be "
        "named in `cors`: with `*` every page of the web could act for its visitors.",
    )
    cors_allow_headers: tuple[str, ...] = option((), "More request headers that browsers may send.")
    cors_expose_headers: tuple[str, ...] = option(
        (), "More response headers that scripts in browsers may read."
    )
    cors_max_age: float = option(
        86400.0, "How long browsers may remember the answer to a preflight.", kind=Duration
    )

    def contradictions(self) -> Iterator[str]:
        """Yield what is wrong with the options together."""
        # "Access-Control-Allow-Origin: *" takes no credentials (the Fetch standard, 3.3.5), and
        # to name whatever origin asks instead would take that protection away.
        strange = [
            origin for origin in self.cors if any(map(origin_pattern(origin).fullmatch, _STRANGERS))
        ]
        if self.cors_credentials and strange:
            yield (
                f"[{MAIN}] cors_credentials = true: With cors = {strange[0]} pages of every origin "
                "could use the credentials of their visitors. Name the origins in cors."
            )
