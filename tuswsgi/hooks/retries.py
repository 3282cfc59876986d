"""Retries of the transports that use a network.

Only blocking hooks are retried here, while the client waits. ``outbox`` retries all others.
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


class TransientFailure(HookFailed):
    """A failure that a retry may mend."""


class PermanentFailure(HookFailed):
    """A failure that no retry will mend, because the application refused the hook."""


def with_retries(
    attempt: Callable[[], T], request: HookRequest, *, retries: int, backoff: float
) -> T:
    """Call `attempt` and return its result; retry blocking hooks.

    :param retries: how many times to retry after a ``TransientFailure``.
    :param backoff: seconds between two attempts.
    :raises HookFailed: the error of the last attempt. There is no further attempt if the
        request's deadline would pass before it.
    """
    left = retries if request.type.blocking else 0
    while True:
        try:
            return attempt()
        except TransientFailure as error:
            if left <= 0 or not request.may_wait(backoff):
                raise
            left -= 1
            log.info(
                "%s of %s will be retried: %s", request.type, request.info.id, printable(str(error))
            )
        time.sleep(backoff)
