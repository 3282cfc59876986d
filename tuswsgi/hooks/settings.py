"""The settings of hooks that all transports share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tuswsgi.core.events import HookType
from tuswsgi.core.options import MAIN, Duration, KiB, Size, option
from tuswsgi.hooks.payloads import FormatName, payload_format


@dataclass(frozen=True)
class EnabledHooks:
    """Which hooks are sent."""

    section: ClassVar[str] = MAIN

    #: The default is rustus'.
    hooks: tuple[HookType, ...] = option(
        (
            HookType.PRE_CREATE,
            HookType.POST_CREATE,
            HookType.POST_RECEIVE,
            HookType.PRE_TERMINATE,
            HookType.POST_TERMINATE,
            HookType.POST_FINISH,
        ),
        "The hooks that are sent by the transports that are configured: "
        + ", ".join(f"`{type}`" for type in HookType)
        + ".",
        rustus="HOOKS",
        aliases=("hooks-enabled-events",),
    )


@dataclass(frozen=True)
class HookSettings:
    """The format and the limits of hooks."""

    section: ClassVar[str] = "hooks"

    format: FormatName = option(
        FormatName.DEFAULT,
        "The format of hooks. The first three are rustus' and differ only in the payload; "
        "`tusd-v2` is what tusd 2 sends, at the times when tusd sends it. In it, a repeated header "
        "has several values; under servers other than `tuswsgi serve` and our gunicorn worker it "
        "has one, joined by commas.",
        rustus="HOOKS_FORMAT",
    )
    blocking_timeout: float | None = option(
        None,
        "How long a request may wait for one of its blocking hooks, including all transports, "
        "URLs, attempts and pauses; then it is answered 503. Unset: as long as the transports "
        "allow. With their defaults, a receiver that hangs delays a request by 11 s over HTTP (4 "
        "attempts of 2 s, 3 pauses of 1 s) and by 63 s over gRPC, a program by 60 s.",
        kind=Duration,
    )
    max_headers: int = option(
        64 * KiB,
        "How many bytes of request headers (names and values) a hook carries at most. Beyond that, "
        "whole headers are dropped: the longest first, and forwarded ones (`proxy_headers`, "
        "`forward_headers`) last.",
        kind=Size,
    )
    progress_interval: float = option(
        1.0,
        "The shortest time between two `post-receive` hooks of an upload while bytes arrive.",
        kind=Duration,
        aliases=("progress-hooks-interval",),
    )

    @property
    def follows_tusd(self) -> bool:
        """Whether hooks are sent when tusd 2 sends them."""
        return payload_format(self.format).follows_tusd
