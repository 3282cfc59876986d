"""The headers of tus, parsed from a WSGI environ and built for responses.

A malformed header is refused with a 400 that names it and says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

from tuswsgi.core.errors import (
    AmbiguousUploadLength,
    InvalidConcat,
    InvalidContentType,
    InvalidUploadDeferLength,
    InvalidUploadLength,
    InvalidUploadOffset,
    UnsupportedTransferCoding,
    UnsupportedVersion,
)
from tuswsgi.core.info import FileInfo, Metadata
from tuswsgi.transfer.body import decimal
from tuswsgi.transfer.checksum import Checksum

VERSION = "1.0.0"
OFFSET_OCTET_STREAM = "application/offset+octet-stream"

TUS_RESUMABLE = "Tus-Resumable"
TUS_VERSION = "Tus-Version"
TUS_EXTENSION = "Tus-Extension"
TUS_MAX_SIZE = "Tus-Max-Size"
TUS_CHECKSUM_ALGORITHM = "Tus-Checksum-Algorithm"
UPLOAD_OFFSET = "Upload-Offset"
UPLOAD_LENGTH = "Upload-Length"
UPLOAD_DEFER_LENGTH = "Upload-Defer-Length"
UPLOAD_METADATA = "Upload-Metadata"
UPLOAD_CONCAT = "Upload-Concat"
UPLOAD_CHECKSUM = "Upload-Checksum"
UPLOAD_EXPIRES = "Upload-Expires"
METHOD_OVERRIDE = "X-HTTP-Method-Override"

#: The headers that scripts in browsers may send, and those that they may read (web/cors.py).
REQUEST_HEADERS = (
    TUS_RESUMABLE,
    UPLOAD_OFFSET,
    UPLOAD_LENGTH,
    UPLOAD_DEFER_LENGTH,
    UPLOAD_METADATA,
    UPLOAD_CONCAT,
    UPLOAD_CHECKSUM,
    METHOD_OVERRIDE,
)
RESPONSE_HEADERS = (
    TUS_RESUMABLE,
    TUS_VERSION,
    TUS_EXTENSION,
    TUS_MAX_SIZE,
    TUS_CHECKSUM_ALGORITHM,
    UPLOAD_OFFSET,
    UPLOAD_LENGTH,
    UPLOAD_DEFER_LENGTH,
    UPLOAD_METADATA,
    UPLOAD_CONCAT,
    UPLOAD_EXPIRES,
)


class TusHeaders:
    """The tus headers of one request.

    :param environ: the request's WSGI environ.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._environ = environ

    def get(self, name: str) -> str | None:
        """Return a header's value; those of repeated headers are joined by commas."""
        value: str | None = self._environ.get("HTTP_" + name.upper().replace("-", "_"))
        return value

    @property
    def method(self) -> str:
        """The method, in upper case, which may be overridden.

        "The X-HTTP-Method-Override request header MUST be a string which MUST be interpreted as
        the request's method by the Server [...]. The actual method of the request MUST be
        ignored."
        """
        sent: str = self.get(METHOD_OVERRIDE) or self._environ["REQUEST_METHOD"]
        return sent.strip().upper()

    def check_version(self) -> None:
        """Refuse a request of another version.

        "The Tus-Resumable header MUST be included in every request [...] except for
        OPTIONS requests. [...] If the version specified by the Client is not supported by
        the Server, it MUST respond with the 412 Precondition Failed status".
        """
        if self._environ.get("HTTP_TUS_RESUMABLE") != VERSION:
            raise UnsupportedVersion

    @property
    def names_version(self) -> bool:
        """Whether there is a ``Tus-Resumable`` header."""
        return "HTTP_TUS_RESUMABLE" in self._environ

    def check_transfer_coding(self) -> None:
        """Refuse a transfer coding that is not supported, such as gzip.

        "A server that receives a request message with a transfer coding it does not understand
        SHOULD respond with 501 (Not Implemented)." (RFC 9112, 6.1)
        """
        coding: str | None = self._environ.get("HTTP_TRANSFER_ENCODING")
        if coding is not None and coding.strip(" \t").lower() != "chunked":
            raise UnsupportedTransferCoding

    @property
    def offset(self) -> int:
        """``Upload-Offset``: "The value MUST be a non-negative integer."."""
        text = self._environ.get("HTTP_UPLOAD_OFFSET")
        if text is None:
            raise InvalidUploadOffset("The Upload-Offset header is missing.")
        return decimal(UPLOAD_OFFSET, text, InvalidUploadOffset)

    @property
    def length(self) -> int | None:
        """``Upload-Length``: "The value MUST be a non-negative integer."."""
        text = self._environ.get("HTTP_UPLOAD_LENGTH")
        return None if text is None else decimal(UPLOAD_LENGTH, text, InvalidUploadLength)

    @property
    def defers_length(self) -> bool:
        """``Upload-Defer-Length``: "Its value MUST be `1`."."""
        text = self._environ.get("HTTP_UPLOAD_DEFER_LENGTH")
        if text is None:
            return False
        if text != "1":
            raise InvalidUploadDeferLength
        return True

    @property
    def promised_size(self) -> int | None:
        """The size of a new upload, ``None`` if it is deferred.

        "The request MUST include one of the following headers: a) Upload-Length [...]
        b) Upload-Defer-Length: 1" (Creation, POST).
        """
        length = self.length
        deferred = self.defers_length
        if deferred and length is not None:
            raise AmbiguousUploadLength
        if not deferred and length is None:
            raise InvalidUploadLength("Upload-Length or Upload-Defer-Length is missing.")
        return length

    @property
    def metadata(self) -> Metadata:
        text = self._environ.get("HTTP_UPLOAD_METADATA")
        return Metadata() if text is None else Metadata.parse(text)

    @property
    def concat(self) -> str | None:
        """``Upload-Concat`` as it was sent: ``partial`` or ``final;`` and URLs."""
        text: str | None = self._environ.get("HTTP_UPLOAD_CONCAT")
        if text is not None and text != "partial" and not text.startswith("final;"):
            raise InvalidConcat("The Upload-Concat header must be partial or final;URLs.")
        return text

    @property
    def checksum(self) -> Checksum | None:
        text = self._environ.get("HTTP_UPLOAD_CHECKSUM")
        return None if text is None else Checksum.parse(text)

    @property
    def announces_checksum(self) -> bool:
        """Whether ``Trailer`` says that the checksum comes after the body."""
        trailers: str = self._environ.get("HTTP_TRAILER", "")
        return trailers != "" and UPLOAD_CHECKSUM.lower() in (
            name.strip().lower() for name in trailers.split(",")
        )

    def check_content_type(self) -> None:
        """Refuse bytes of another type: "All PATCH requests MUST use Content-Type:
        application/offset+octet-stream, otherwise the server SHOULD return a 415"."""
        media_type, _, _ = self._environ.get("CONTENT_TYPE", "").partition(";")
        if media_type.strip().lower() != OFFSET_OCTET_STREAM:
            raise InvalidContentType


def final_urls(concat: str, most: int) -> list[str]:
    """Return the URLs in an ``Upload-Concat`` header of a final upload.

    "The value MUST be `final` followed by a semicolon and a space-separated list of the
    partial upload URLs that need to be concatenated."

    :param most: the most URLs. "The same partial upload MAY be present multiple times", so a
        short header can cause much work.
    :raises InvalidConcat: if there are more, or none.
    """
    urls = concat.removeprefix("final;").split()
    if not urls:
        raise InvalidConcat("The Upload-Concat header names no partial upload.")
    if len(urls) > most:
        raise InvalidConcat(f"The Upload-Concat header names more than {most} partial uploads.")
    return urls


def describe(info: FileInfo, *, full: bool) -> list[tuple[str, str]]:
    """Return the headers that describe an upload.

    :param full: whether to return all, as for HEAD; otherwise those for POST and PATCH.
    """
    headers = []
    # "The response to a HEAD request for a final upload SHOULD NOT contain the
    # Upload-Offset header unless the concatenation has been successfully finished."
    if not info.is_final or info.is_finished:
        headers.append((UPLOAD_OFFSET, str(info.offset)))
    if full:
        if info.size is not None:
            headers.append((UPLOAD_LENGTH, str(info.size)))
        elif not info.is_final:
            headers.append((UPLOAD_DEFER_LENGTH, "1"))
        if info.metadata.raw:
            headers.append((UPLOAD_METADATA, info.metadata.raw))
        if info.concat is not None:
            headers.append((UPLOAD_CONCAT, info.concat))
    if info.expires_at is not None and not info.is_finished:
        headers.append((UPLOAD_EXPIRES, formatdate(info.expires_at, usegmt=True)))
    return headers
