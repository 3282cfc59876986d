"""Builds responses from what the protocol returned or raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from flask import Response

from tuswsgi.core.errors import (
    HookRefusal,
    MethodNotAllowed,
    OffsetMismatch,
    RangeNotSatisfiable,
    TusError,
    UnsupportedVersion,
)
from tuswsgi.core.info import FinalResponse
from tuswsgi.hooks.base import HookResponse
from tuswsgi.transfer.body import RequestBody
from tuswsgi.transfer.exchange import send
from tuswsgi.transfer.sendfile import Content
from tuswsgi.web.headers import TUS_VERSION, UPLOAD_OFFSET, VERSION

Headers = list[tuple[str, str]]

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {460: "Checksum Mismatch"}


@dataclass
class Answer:
    """A response. It is a WSGI application, which sends it.

    :param request_body: the body of the request, which may not have been read.
    """

    status: int
    headers: Headers
    content: bytes | Content = b""
    request_body: RequestBody | None = None

    def __post_init__(self) -> None:
        if self.status in (204, 304):
            # They have no body, even if a hook sets one: it would be taken for the next response.
            self.content = b""

    @property
    def status_line(self) -> str:
        return f"{self.status} {_REASONS.get(self.status, 'Unknown')}"

    def headers_for(self, environ: Mapping[str, Any]) -> Headers:
        """Return the headers of the response to a request.

        "A server MUST NOT send a Content-Length header field in [a response to HEAD] unless its
        field value equals the decimal number of octets that would have been sent in the content
        of a response if the same request had used the GET method." (RFC 9110, 8.6)
        """
        if (
            not isinstance(self.content, bytes)
            or self.status in (204, 304)
            or environ["REQUEST_METHOD"] == "HEAD"
        ):
            return self.headers
        return [*self.headers, ("Content-Length", str(len(self.content)))]

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        start_response(self.status_line, self.headers_for(environ))
        content: Iterable[bytes] = ()
        # gunicorn would not send the content of a response to HEAD, but log each time.
        if self.content and environ["REQUEST_METHOD"] != "HEAD":
            content = (self.content,) if isinstance(self.content, bytes) else self.content
        return send(content, self.request_body, environ, start_response)


class TusResponse(Response):
    """An ``Answer`` as a Flask response, which an embedding application may change."""

    default_mimetype = None

    #: Whether the headers can be sent as they are. Those of an application's own response are
    #: completed by werkzeug first.
    are_final = False
    request_body: RequestBody | None = None

    def __init__(self, answer: Answer, environ: Mapping[str, Any]) -> None:
        content = answer.content
        # The length of a response to HEAD would be taken for that of GET.
        self.automatically_set_content_length = environ["REQUEST_METHOD"] != "HEAD"
        super().__init__(
            [content] if isinstance(content, bytes) else content,
            status=answer.status_line,
            headers=answer.headers_for(environ),
            direct_passthrough=not isinstance(content, bytes),
        )
        self.are_final = True
        self.request_body = answer.request_body

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        content: Iterable[bytes]
        if self.are_final and not self._on_close:
            start_response(self.status, self.headers.to_wsgi_list())
            passed = cast("Iterable[bytes]", self.response)
            content = passed if self.direct_passthrough else self.iter_encoded()
            if environ["REQUEST_METHOD"] == "HEAD":
                content = ()
        else:
            content = super().__call__(environ, start_response)
        return send(content, self.request_body, environ, start_response)


def error_response(error: TusError, common: Headers, body: RequestBody | None) -> Answer:
    """Return the response to an error: one line with its code and its message."""
    headers = [*common, ("Cache-Control", "no-store")]
    text = f"{error.code}: {error.message}\n"
    if error.retry_after is not None:
        headers.append(("Retry-After", str(error.retry_after)))
    if isinstance(error, OffsetMismatch):
        headers.append((UPLOAD_OFFSET, str(error.offset)))
    elif isinstance(error, UnsupportedVersion):
        # "it MUST respond with the 412 Precondition Failed status and MUST include the
        # Tus-Version header into the response." (Tus-Resumable)
        headers.append((TUS_VERSION, VERSION))
    elif isinstance(error, MethodNotAllowed):
        headers.append(("Allow", ", ".join(error.allowed)))
    elif isinstance(error, RangeNotSatisfiable):
        headers.append(("Content-Range", f"bytes */{error.size}"))
    elif isinstance(error, HookRefusal):
        headers = _merged(headers, error.headers.items())
        text = text if error.body is None else error.body
    return text_response(error.status, headers, text, body)


def text_response(status: int, headers: Headers, text: str, body: RequestBody | None) -> Answer:
    """Return a response with a text, which is plain unless the headers name another type."""
    if text and not any(name.lower() == "content-type" for name, _ in headers):
        headers = [*headers, ("Content-Type", "text/plain; charset=utf-8")]
    return Answer(status, headers, text.encode(), body)


def success_response(
    status: int,
    headers: Headers,
    answer: HookResponse | FinalResponse | None,
    body: RequestBody,
) -> Answer:
    """Return the response to a request that succeeded, with the changes of a hook."""
    if answer is None:
        return Answer(status, headers, b"", body)
    merged = _merged(headers, answer.headers.items())
    return text_response(answer.status or status, merged, answer.body or "", body)


def _merged(headers: Headers, more: Iterable[tuple[str, str]]) -> Headers:
    """Return our headers with those of a hook, which may replace all but the protocol's.

    tusd sets ``Location`` and ``Upload-Offset`` after the hook, too.
    """
    fixed = {name.lower() for name, _ in headers if _is_of_protocol(name)}
    more = [(name, value) for name, value in more if name.lower() not in fixed]
    names = {name.lower() for name, _ in more}
    return [(name, value) for name, value in headers if name.lower() not in names] + more


def _is_of_protocol(name: str) -> bool:
    return name.lower() == "location" or name.lower().startswith(("upload-", "tus-"))
