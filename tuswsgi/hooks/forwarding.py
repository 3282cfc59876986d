"""Headers of the client's request that are forwarded with hooks.

A header that the transport cannot send is left out and logged. Otherwise every attempt would
fail, and clients could suppress the hooks of their own uploads.
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
    """Return the headers to forward.

    :param names: the names of these headers, as the transport sends them.
    :param is_sendable: returns whether the transport can send a value.
    :param most: their largest total size in bytes, ``None`` for any. Shorter headers go first.
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
