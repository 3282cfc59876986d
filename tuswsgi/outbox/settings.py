"""The settings of the delivery of post-hooks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from marshmallow import ValidationError

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.options import Duration, option


class DeliveryMode(str, Enum):
    """What is promised about post-hooks."""

    AT_LEAST_ONCE = "at-least-once"
    FIRE_AND_FORGET = "fire-and-forget"


def _at_least_one(value: float) -> None:
    if value < 1:
        raise ValidationError("Not 1 or more.")


@dataclass(frozen=True)
class DeliverySettings:
    """How post-hooks are delivered."""

    section: ClassVar[str] = "hooks"

    delivery: DeliveryMode = option(
        DeliveryMode.AT_LEAST_ONCE,
        "`at-least-once` stores a post-hook together with the change that it reports, and retries "
        "it until it arrives, whatever crashes in between; `fire-and-forget` sends it once.",
    )
    delivery_attempts: int = option(
        200,
        "How often a post-hook is tried before it becomes a dead letter. With the pauses between "
        "them, 200 attempts take more than a day.",
        validate=_at_least_one,
    )
    delivery_refusals: int = option(
        8,
        "How often a post-hook is tried that its receiver refuses for good (HTTP: a 4xx other than "
        "408, 425 and 429; gRPC: a status such as `INVALID_ARGUMENT`) before it becomes a dead "
        "letter and the next one of its upload is sent. With the pauses between them, 8 attempts "
        "take two minutes.",
        validate=_at_least_one,
    )
    delivery_backoff: float = option(
        1.0,
        "The pause after the first failure of a post-hook; each further failure doubles it.",
        kind=Duration,
    )
    delivery_max_backoff: float = option(
        600.0, "The longest pause between two attempts.", kind=Duration
    )
    delivery_pool: int = option(
        16,
        "How many post-hooks a worker sends at the same time through each transport.",
        validate=_at_least_one,
    )
    delivery_lease: float = option(
        30.0,
        "How long the post-hooks of a worker that died wait until another worker takes them over.",
        kind=Duration,
        validate=_at_least_one,
    )

    @property
    def backoff(self) -> Backoff:
        """The pauses between the attempts to deliver an event."""
        return Backoff(self.delivery_backoff, self.delivery_max_backoff, jitter=0.25)
