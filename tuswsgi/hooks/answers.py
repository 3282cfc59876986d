"""What of a hook's answer can be obeyed, and what would harm a client, a proxy or a disk.

Answers come from other programs and from functions of the application alike. This file
says which statuses, headers, ids and paths are taken from them; what they mean is the
protocol's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tuswsgi.errors import HookFailed, UploadNotFound
from tuswsgi.hooks.base import ChangeFileInfo
from tuswsgi.info import check_id
from tuswsgi.paths import contained

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

    :raises HookFailed: if the status or a header would break the response.
    """
    if status is not None and (type(status) is not int or not 200 <= status <= 599):
        # 1xx is no final answer: the client would go on waiting.
        raise HookFailed(f"The status {status!r} is none between 200 and 599.")
    for name, value in headers.items():
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise HookFailed(f"The header {name!r} cannot be sent.")
    return {name: value for name, value in headers.items() if name.lower() not in _FRAMING}


def check_change(change: ChangeFileInfo) -> None:
    """Refuse an id or a path that no upload may have. An empty one changes nothing.

    :raises HookFailed: so that the client comes back when the hook is better.
    """
    try:
        if change.id:
            check_id(change.id)
    except UploadNotFound:
        raise HookFailed(f"The id {change.id!r} cannot be that of an upload.") from None
    try:
        if change.path:
            _check_path(change.path)
    except UploadNotFound:
        raise HookFailed(f"The path {change.path!r} cannot be that of an upload.") from None


def _check_path(path: str) -> None:
    contained(path)
    if len(path) > _LONGEST_PATH or any(
        len(segment.encode()) > _LONGEST_SEGMENT for segment in path.split("/")
    ):
        raise UploadNotFound
