"""One request and its response, in the best way that the WSGI server allows.

``body_of`` returns the body, and ``send`` what the server is to send. Nothing above this package
knows which server it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tuswsgi.transfer.body import EmptyBody, PlainBody, RequestBody, content_length
from tuswsgi.transfer.gunicorn import close_after, gunicorn_body, response_of, socket_of
from tuswsgi.transfer.sendfile import Content, SentContent
from tuswsgi.transfer.sockets import is_gevents

StartResponse = Callable[..., Any]


def body_of(environ: Mapping[str, Any]) -> RequestBody:
    """Return the body of a request.

    :raises BadRequest: if its length is malformed.
    """
    length = content_length(environ)
    if length == 0:
        return EmptyBody()
    return gunicorn_body(environ, length) or PlainBody(environ, length, socket_of(environ))


def send(
    content: Iterable[bytes],
    body: RequestBody | None,
    environ: Mapping[str, Any],
    start_response: StartResponse,
) -> Iterable[bytes]:
    """Return the iterable for the server, which also takes care of what is unread of the body.

    :param start_response: has been called.
    """
    if isinstance(content, Content):
        content = _sent_directly(content, environ, start_response)
    if body is None or body.ended:
        return content
    is_kept = body.can_drain()
    if body.ended:
        return content
    if not is_kept:
        body.abandon()
        close_after(start_response)
    return _LingeringContent(content, body, start_response, is_kept=is_kept)


def _sent_directly(
    content: Content, environ: Mapping[str, Any], start_response: StartResponse
) -> Iterable[bytes]:
    sock = socket_of(environ)
    response = response_of(start_response)
    if response is None or not is_gevents(sock):
        return content

    def count(sent: int) -> None:
        response.sent = sent  # for the access log

    return SentContent(content, sock, count)


class _LingeringContent:
    """A response that is sent before the body of the request has been read.

    When it is sent, the rest is read so that the next request may follow, or the client gets the
    chance to read the response before the connection is closed.

    :param is_kept: whether the connection is kept if the rest arrives in time.
    """

    def __init__(
        self,
        content: Iterable[bytes],
        body: RequestBody,
        start_response: StartResponse,
        *,
        is_kept: bool,
    ) -> None:
        self._content = content
        self._body = body
        self._start_response = start_response
        self._is_kept = is_kept

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._content)

    def close(self) -> None:
        close = getattr(self._content, "close", None)
        if close is not None:
            close()
        if self._is_kept:
            self._body.drain()
            if self._body.ended:
                return
            self._body.abandon()
            close_after(self._start_response)
        self._body.linger()
