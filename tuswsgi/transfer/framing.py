"""How long the body of a request is said to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuswsgi.core.errors import BadRequest
from tuswsgi.core.info import MAX_SIZE

#: int() takes no more digits, leading zeros included.
_MOST_DIGITS = 4300


def content_length(environ: Mapping[str, Any]) -> int | None:
    """Return ``Content-Length``; ``None`` for a chunked body, 0 for no body."""
    if "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
        return None
    text = environ.get("CONTENT_LENGTH") or "0"
    return decimal("Content-Length", text, BadRequest)


def decimal(name: str, text: str, error: type[BadRequest]) -> int:
    # int() takes signs, blanks, underscores and digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise error(f"The {name} header is not a non-negative integer.")
    if len(text) > _MOST_DIGITS:
        raise error(f"The {name} header is longer than {_MOST_DIGITS} digits.")
    if len(text.lstrip("0")) > 19 or (number := int(text)) > MAX_SIZE:
        raise error(f"The {name} header is larger than 2^63-1.")
    return number
