"""Headers of clients' requests that go along with hooks.

This file owns that a header which cannot be sent is left out, with a line in the log: as a part
of the hook it would make every attempt fail, and clients could suppress the hooks of their own
uploads. What can be sent is the transports' business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from tuswsgi.hooks.base import HookRequest

log = logging.getLogger(__name__)


def forwarded(
    request: HookRequest,
    names: Collection[str],
    is_sendable: Callable[[str], bool],
    most: int | None = None,
) -> dict[str, str]:
    """Return the headers that are sent along, by the names that are given.

    :param names: those that are wanted.
    :param is_sendable: whether the transport takes a value.
    :param most: how many bytes there may be of them, the shortest ones first; ``None`` for any.
    """
    headers = request.request.headers
    wanted = {name: headers[name.lower()] for name in names if name.lower() in headers}
    kept: dict[str, str] = {}
    left_out = []
    total = 0
    for name, value in sorted(wanted.items(), key=lambda header: len(header[1])):
        size = len(name) + len(value)
        if is_sendable(value) and (most is None or total + size <= most):
            kept[name] = value
            total += size
        else:
            left_out.append(name)
    if left_out:
        log.warning(
            "%s of %s: headers that cannot be sent are left out: %s",
            request.type,
            request.info.id,
            ", ".join(left_out),
        )
    return kept
