"""Validates the answers of hooks, whatever transport or function they come from.

A status, header, id or path that would harm the client, a proxy or the data store is an
error of the hook.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tuswsgi.core.errors import HookBroken, UploadNotFound
from tuswsgi.core.info import ID_RULE, check_id
from tuswsgi.core.paths import contained
from tuswsgi.hooks.base import ChangeFileInfo, HookResponse

#: A token (RFC 9110, 5.6.2).
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)

#: A header's value (RFC 9110, 5.5), in Latin-1 as WSGI servers send it.
_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")

#: Headers about one message and its connection: they are not passed on (RFC 9110, 7.6.1), and
#: servers and clients set them themselves.
CONNECTION_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

#: The longest path and segment in bytes; data stores make longer names of them.
_LONGEST_PATH = 1000
_LONGEST_SEGMENT = 200


def check_answer(answer: HookResponse) -> HookResponse:
    """Return an answer without the headers that the server sets itself.

    :raises HookBroken: if the status, a header, the id or the path is invalid.
    """
    change = None if answer.change is None else _check_change(answer.change)
    headers = check_headers(answer.status, answer.headers)
    return replace(answer, change=change, headers=headers)


def check_headers(status: int | None, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers to send to a client, without those that the server sets itself.

    :param status: the status to send with them, ``None`` for the protocol's own.
    :raises HookBroken: if the status or a header is invalid.
    """
    if status is not None and (type(status) is not int or not 200 <= status <= 599):
        # After a 1xx the client would wait for the final response.
        raise HookBroken(f"The status {status!r} is not between 200 and 599.")
    for name, value in headers.items():
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise HookBroken(f"The header {name!r} cannot be sent.")
    return {
        name: value for name, value in headers.items() if name.lower() not in CONNECTION_HEADERS
    }


def _check_change(change: ChangeFileInfo) -> ChangeFileInfo:
    try:
        if change.id:
            check_id(change.id)
    except UploadNotFound:
        raise HookBroken(f"The id {change.id!r} cannot be that of an upload: {ID_RULE}.") from None
    try:
        if change.path:
            change = replace(change, path=_check_path(change.path))
    except UploadNotFound:
        raise HookBroken(
            f"The path {change.path!r} cannot be that of an upload: it must lie below the data "
            "directory, and no part of it may be empty, begin with a dot, contain a backslash or "
            f"unprintable characters, or be longer than {_LONGEST_SEGMENT} bytes."
        ) from None
    return change


def _check_path(path: str) -> str:
    # tusd's documents write paths below the data directory with a leading "./".
    path = path.removeprefix("./")
    contained(path)
    if len(path) > _LONGEST_PATH or any(
        len(segment.encode()) > _LONGEST_SEGMENT for segment in path.split("/")
    ):
        raise UploadNotFound
    return path
