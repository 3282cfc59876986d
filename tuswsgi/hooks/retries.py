"""Asking again: what the transports that go over a network do about passing failures.

Only blocking hooks are repeated here, while the client waits. Of the others delivery takes
care.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tuswsgi.core.display import printable
from tuswsgi.core.errors import HookFailed
from tuswsgi.hooks.base import HookRequest

log = logging.getLogger(__name__)

T = TypeVar("T")


class PassingFailure(HookFailed):
    """A failure that may be over in a moment."""


class LastingFailure(HookFailed):
    """A failure that will hardly ever be over: the application will not have it."""


def persistently(
    attempt: Callable[[], T], request: HookRequest, *, retries: int, backoff: float
) -> T:
    """Return what `attempt` returns, if a blocking hook has to be repeated for that.

    :param retries: how often it is repeated after a ``PassingFailure``.
    :param backoff: seconds between two attempts.
    :raises HookFailed: as the last attempt: that which leaves no time for another one.
    """
    left = retries if request.type.blocking else 0
    while True:
        try:
            return attempt()
        except PassingFailure as error:
            if left <= 0 or not request.may_wait(backoff):
                raise
            left -= 1
            log.info(
                "%s of %s is repeated: %s", request.type, request.info.id, printable(str(error))
            )
        time.sleep(backoff)
