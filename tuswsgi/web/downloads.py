"""Downloads: the headers of an upload's content, conditional requests and ranges.

Uploads come from untrusted clients, so no browser may run any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

from werkzeug.http import parse_date, parse_etags, parse_range_header

from tuswsgi.core.errors import PreconditionFailed, RangeNotSatisfiable
from tuswsgi.core.info import FileInfo, Metadata

#: Types that a browser may display; the list is tusd's. Others, such as HTML and SVG, may contain
#: scripts.
INLINE_TYPES = frozenset(
    {
        "text/plain",
        "image/png",
        "image/jpeg",
        "image/gif",
        "image/bmp",
        "image/webp",
        "audio/wave",
        "audio/wav",
        "audio/x-wav",
        "audio/x-pn-wav",
        "audio/webm",
        "audio/ogg",
        "video/mp4",
        "video/webm",
        "video/ogg",
        "application/ogg",
    }
)

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PARAMETER = rf' *; *({_TOKEN})=(?:{_TOKEN}|"[^"\\\x00-\x1f\x7f]*")'
_MEDIA_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})((?:{_PARAMETER})*)")

Headers = list[tuple[str, str]]


def content_headers(info: FileInfo) -> Headers:
    """Return the type of an upload's content and how a browser may show it."""
    media_type = (info.metadata.text("filetype") or info.metadata.text("type") or "").strip()
    bare = _bare_type(media_type)
    if bare is None:
        bare = media_type = "application/octet-stream"
    return [
        ("Content-Type", media_type),
        ("Content-Disposition", disposition(info.metadata, inline=bare in INLINE_TYPES)),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "sandbox"),
    ]


def _bare_type(text: str) -> str | None:
    """Return a media type without its parameters, ``None`` if it is malformed.

    Programs disagree on which of two parameters with the same name counts.
    """
    match = _MEDIA_TYPE.fullmatch(text)
    if match is None or not text.isascii():
        return None
    names = [name.lower() for name in re.findall(_PARAMETER, match[2])]
    return match[1].lower() if len(names) == len(set(names)) else None


def disposition(metadata: Metadata, *, inline: bool) -> str:
    """Return ``Content-Disposition`` with the upload's name (RFC 6266).

    Control characters and directories are removed from the client's name. A name that is not ASCII
    is sent twice, the second time in the form of RFC 8187.
    """
    kind = "inline" if inline else "attachment"
    name = metadata.text("filename") or metadata.text("name") or ""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(char for char in name if char.isprintable()).strip()
    if not name:
        return kind
    plain = "".join(char if char.isascii() and char not in '"%' else "_" for char in name)
    if plain == name:
        return f'{kind}; filename="{plain}"'
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def validators(info: FileInfo) -> Headers:
    """Return the validators of the content, which never changes once the upload is finished.

    A hook may reuse the id of a removed upload, so the id alone is no strong tag (RFC 9110, 8.8.1).
    """
    if not info.is_finished or info.finished_at is None:
        return [("Cache-Control", "no-store")]
    return [
        ("ETag", f'"{info.id}-{round(info.finished_at * 1e6):x}"'),
        ("Last-Modified", formatdate(info.finished_at, usegmt=True)),
        ("Accept-Ranges", "bytes"),
    ]


def is_cached(environ: Mapping[str, Any], headers: Headers) -> bool:
    """Return whether the client has the content already (RFC 9110, 13.2.2).

    :raises PreconditionFailed: if the client asks for another version.
    """
    named = dict(headers)
    tag = named.get("ETag")
    changed = _date(named.get("Last-Modified"))
    if not _is_wanted(environ, tag, changed):
        raise PreconditionFailed
    if tag is None or changed is None:
        return False
    if known := parse_etags(environ.get("HTTP_IF_NONE_MATCH")):
        return known.star_tag or known.contains_weak(_bare(tag))
    since = _date(environ.get("HTTP_IF_MODIFIED_SINCE"))
    return since is not None and changed <= since


def _is_wanted(environ: Mapping[str, Any], tag: str | None, changed: datetime | None) -> bool:
    if text := environ.get("HTTP_IF_MATCH"):
        wanted = parse_etags(text)
        return wanted.star_tag or (tag is not None and wanted.is_strong(_bare(tag)))
    # "A recipient MUST ignore the If-Unmodified-Since header field if the received field value
    # is not a valid HTTP-date" (RFC 9110, 13.1.4), or if it knows no date itself.
    since = _date(environ.get("HTTP_IF_UNMODIFIED_SINCE"))
    return since is None or changed is None or changed <= since


def _bare(tag: str) -> str:
    """Return a strong tag as werkzeug compares it, without its quotes."""
    return tag[1:-1]


def _date(text: str | None) -> datetime | None:
    """Return the date in a header, ``None`` if it is missing or malformed."""
    try:
        return parse_date(text)
    except OverflowError:
        # A part of it is too large for an integer of C.
        return None


def wanted_range(environ: Mapping[str, Any], headers: Headers, size: int) -> tuple[int, int] | None:
    """Return the requested range [start, stop), ``None`` for the whole content.

    A request for several ranges gets the whole content, as RFC 9110, 14.2 allows.

    :raises RangeNotSatisfiable: if the range is outside the content.
    """
    named = dict(headers)
    if "ETag" not in named or "HTTP_RANGE" not in environ:
        return None
    if not _range_applies(environ.get("HTTP_IF_RANGE"), named):
        return None
    parsed = parse_range_header(environ["HTTP_RANGE"])
    if parsed is None or parsed.units != "bytes" or len(parsed.ranges) != 1:
        return None
    begin, end = parsed.ranges[0]
    # "If the selected representation is shorter than the specified suffix-length, the
    # entire representation is used." (RFC 9110, 14.1.2)
    start = begin if begin >= 0 else max(0, size + begin)
    stop = size if end is None else min(end, size)
    if start >= stop:
        raise RangeNotSatisfiable(size)
    return start, stop


def _range_applies(text: str | None, named: Mapping[str, str]) -> bool:
    """Return whether ``If-Range`` names the current version (RFC 9110, 13.1.5)."""
    if text is None:
        return True
    # The comparison is strong, so a weak tag never matches.
    return text == named["ETag"] or _date(text) == _date(named["Last-Modified"])
