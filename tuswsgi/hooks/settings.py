"""The settings of hooks that all transports have in common: which there are, and how they look."""

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
    """How hooks look, and how often progress is told."""

    section: ClassVar[str] = "hooks"

    format: FormatName = option(
        FormatName.DEFAULT,
        "What hooks look like. The first three are rustus' and differ in the payload alone; "
        "`tusd-v2` is what tusd sends today, and hooks come when tusd would send them. There a "
        "header that comes twice has two values; under other servers than `tuswsgi serve` and "
        "our worker for gunicorn it has one, joined by a comma.",
        rustus="HOOKS_FORMAT",
    )
    blocking_timeout: float | None = option(
        None,
        "How long a request may wait for one of its blocking hooks, all transports, URLs, "
        "attempts and the pauses between them together; then it is told to come back (503). "
        "Unset, the sum of what the transports may take: a receiver that hangs costs a request "
        "11 s by HTTP (4 attempts of 2 s, 3 pauses of 1 s) and 63 s by gRPC, a program 60 s.",
        kind=Duration,
    )
    max_headers: int = option(
        64 * KiB,
        "How many bytes of a request's headers, names and values, hooks are told of. Beyond that "
        "headers are left out whole, the longest first, and those that are sent along "
        "(`proxy_headers`, `forward_headers`) after all others.",
        kind=Size,
    )
    progress_interval: float = option(
        1.0,
        "The least time between two `post-receive` of an upload while bytes arrive.",
        kind=Duration,
        aliases=("progress-hooks-interval",),
    )

    @property
    def follows_tusd(self) -> bool:
        """Whether hooks come when today's tusd sends them."""
        return payload_format(self.format).follows_tusd
