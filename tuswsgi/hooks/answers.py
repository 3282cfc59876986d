"""What of a hook's answer can be obeyed, and what would harm a client, a proxy or a disk.

Answers come from other programs and from functions of the application alike. This file
says which statuses, headers, ids and paths are taken from them; what they mean is the
protocol's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tuswsgi.core.errors import HookBroken, UploadNotFound
from tuswsgi.core.info import ID_RULE, check_id
from tuswsgi.core.paths import contained
from tuswsgi.hooks.base import ChangeFileInfo

#: A token (RFC 9110, 5.6.2).
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)

#: What a header's value may hold (RFC 9110, 5.5), as WSGI servers send it: in Latin-1.
_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")

#: How long the body is and what becomes of the connection is the server's business.
_FRAMING = {
    "connection",
    "content-length",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}

#: Room for the names that a data store makes of a path.
_LONGEST_PATH = 1000
_LONGEST_SEGMENT = 200


def check_response(status: int | None, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that can be sent to a client.

    Those that a server decides on itself are left out, as by any proxy.

    :raises HookBroken: if the status or a header would break the response.
    """
    if status is not None and (type(status) is not int or not 200 <= status <= 599):
        # 1xx is no final answer: the client would go on waiting.
        raise HookBroken(f"The status {status!r} is none between 200 and 599.")
    for name, value in headers.items():
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise HookBroken(f"The header {name!r} cannot be sent.")
    return {name: value for name, value in headers.items() if name.lower() not in _FRAMING}


def check_change(change: ChangeFileInfo) -> ChangeFileInfo:
    """Return a change that can be made. An empty id or path changes nothing.

    tusd's documents write a path below the data directory with ``./`` before it.

    :raises HookBroken: if no upload may have the id or the path.
    """
    try:
        if change.id:
            check_id(change.id)
    except UploadNotFound:
        raise HookBroken(f"The id {change.id!r} cannot be that of an upload: {ID_RULE}.") from None
    try:
        if change.path:
            change = replace(change, path=_checked_path(change.path.removeprefix("./")))
    except UploadNotFound:
        raise HookBroken(
            f"The path {change.path!r} cannot be that of an upload: it must lie below the data "
            "directory, and no part of it may be empty, begin with a dot, have a backslash or "
            f"characters that cannot be shown, or be longer than {_LONGEST_SEGMENT} bytes."
        ) from None
    return change


def _checked_path(path: str) -> str:
    contained(path)
    if len(path) > _LONGEST_PATH or any(
        len(segment.encode()) > _LONGEST_SEGMENT for segment in path.split("/")
    ):
        raise UploadNotFound
    return path
