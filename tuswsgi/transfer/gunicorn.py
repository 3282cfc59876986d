"""What we know of gunicorn's internals, and the bodies of requests that come through it.

gunicorn's own ``read`` waits for all bytes that it was asked for, loses them when a connection
breaks, and cannot be interrupted. So bodies are received from gunicorn's socket directly, and
its counters are kept up to date, so that it finds the next request of the connection.
``missing_internals`` tells whether this gunicorn has all that is needed for that.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any, NamedTuple

from tuswsgi.core.errors import BodyIncomplete, BodyMalformed
from tuswsgi.lockers.base import IsLost
from tuswsgi.transfer.body import RequestBody
from tuswsgi.transfer.fairness import CHUNK
from tuswsgi.transfer.framing import ChunkDecoder, TooLong
from tuswsgi.transfer.sockets import BLOCK, BodySocket, body_socket

log = logging.getLogger(__name__)

#: Bytes that are received at once where the next chunks are not known to be larger.
_CHUNKED_BLOCK = 64 * 1024

#: What is relied on: classes, the arguments with which an instance can be made to look at it,
#: and attributes of instances.
_CLASSES: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "gunicorn.http.unreader:SocketUnreader": (
        (None,),
        ("buf.tell", "take_buffered", "unread", "sock", "mxchunk"),
    ),
    "gunicorn.http.body:LengthReader": ((None, 1), ("length", "unreader")),
    "gunicorn.http.body:ChunkedReader": ((None, None), ("parser.__next__", "req")),
    "gunicorn.http.body:Body": ((None,), ("reader", "failed")),
    "gunicorn.http.parser:RequestParser": (
        (None, (), None),
        ("__next__", "cfg", "mesg", "req_count", "unreader"),
    ),
    "gunicorn.http.wsgi:Response": (
        (None, None, None),
        (
            *("chunked", "headers", "headers_sent", "response_length", "sent", "status"),
            *("_omits_body", "req", "sock", "version"),
            *("close", "force_close", "is_chunked", "process_headers", "send_headers"),
            *("should_close", "start_response", "write", "write_file"),
        ),
    ),
}

#: Functions and exceptions that are relied on.
_NAMES = (
    "gunicorn.http.errors:LimitRequestHeaders",
    "gunicorn.http.errors:LimitRequestLine",
    "gunicorn.http.message:Request.parse_headers",
    "gunicorn.http.wsgi:base_environ",
    "gunicorn.util:is_hoppish",
    "gunicorn.util:unquote_to_wsgi_str",
)


class _Readers(NamedTuple):
    """gunicorn's classes for the two kinds of bodies."""

    length: Any
    chunked: Any


@cache
def missing_internals() -> tuple[str, ...]:
    """Return what this gunicorn lacks of what is relied on.

    If there is anything, all is left to gunicorn and bodies are read as PEP 3333 says.
    """
    missing = [path for path in _NAMES if not _exists(path)]
    for path, (arguments, names) in _CLASSES.items():
        try:
            made = resolve_name(path)(*arguments)
        except (ImportError, AttributeError, TypeError):
            made = None
        if f"{type(made).__module__}:{type(made).__name__}" == path:
            missing += [f"{path}.{name}" for name in names if not _has(made, name)]
        else:
            missing.append(path)
    return tuple(name.replace(":", ".") for name in missing)


@cache
def _readers() -> _Readers | None:
    """Return gunicorn's classes, ``None`` if it is not as expected."""
    if missing_internals():
        return None
    from gunicorn.http.body import ChunkedReader, LengthReader

    return _Readers(LengthReader, ChunkedReader)


def socket_of(environ: Mapping[str, Any]) -> Any:
    """Return the connection's socket, ``None`` under other servers."""
    return environ.get("gunicorn.socket")


def gunicorn_body(environ: Mapping[str, Any], length: int | None) -> SocketBody | None:
    """Return the body of a request, ``None`` if it does not come from a gunicorn as expected."""
    sock = socket_of(environ)
    return None if sock is None else _body(environ["wsgi.input"], sock, length)


def _body(source: Any, sock: Any, length: int | None) -> SocketBody | None:
    readers = _readers()
    if readers is None:
        return None
    kind = type(getattr(source, "reader", None))
    if length is not None:
        return LengthBody(source, sock, length) if kind is readers.length else None
    return ChunkedBody(source, sock) if kind is readers.chunked else None


def is_read(source: Any) -> bool:
    """Return whether the next request of the connection may follow.

    :param source: gunicorn's body of the last one.
    """
    if source.failed:
        return False
    left = getattr(source.reader, "length", None)
    return left == 0 if left is not None else getattr(source.reader, "parser", source) is None


def drain(source: Any, sock: Any) -> bool:
    """Read the rest of a body that the application has not read, if it is short.

    :param source: gunicorn's body; reading it has not failed yet.
    :returns: whether the next request of the connection may follow.
    """
    body = _body(source, sock, getattr(source.reader, "length", None))
    if body is None:
        return False
    body.drain()
    return body.ended


def close_after(start_response: object) -> None:
    """Have gunicorn close the connection after the response.

    It takes no ``Connection`` header from applications.
    """
    force_close = getattr(getattr(start_response, "__self__", None), "force_close", None)
    if force_close is not None:
        force_close()


def response_of(start_response: object) -> Any:
    """Return gunicorn's response, ``None`` if this is not a gunicorn as expected."""
    response = getattr(start_response, "__self__", None)
    return response if hasattr(response, "force_close") and not missing_internals() else None


def _exists(path: str) -> bool:
    try:
        resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def _has(thing: object, name: str) -> bool:
    try:
        attrgetter(name)(thing)
    except AttributeError:
        return False
    return True


class SocketBody(RequestBody):
    """A body that is received from gunicorn's socket."""

    def __init__(self, source: Any, sock: Any, length: int | None) -> None:
        super().__init__(length, sock)
        self._source = source
        # Our worker leaves the response 100 to the body: it is sent when bytes are first wanted.
        self._continue = getattr(source, "send_continue", None)

    def receive(self, n: int) -> memoryview | bytes:
        return self._receive(n, None)

    def abandon(self) -> None:
        self._source.failed = not self._ended

    @property
    def _is_given_up(self) -> bool:
        return self._continue is not None or super()._is_given_up

    def _receive_until(self, deadline: float, n: int) -> memoryview | bytes:
        return self._receive(n, deadline)

    def _receive(self, n: int, deadline: float | None) -> memoryview | bytes:
        if self._ended or self._is_woken:
            return b""
        try:
            if self._continue is not None:
                self._send_continue()
            return self._take(n, deadline)
        except BaseException as error:
            self._source.failed = True
            if isinstance(error, OSError):
                raise _broken_off(error) from error
            raise

    @abstractmethod
    def _take(self, n: int, deadline: float | None) -> memoryview | bytes:
        """Wait for bytes and return 1 to `n` of them, nothing at the end or once woken.

        :raises OSError: if the body broke off.
        """

    def _send_continue(self) -> None:
        send = self._continue
        self._continue = None
        if send is not None:
            send()


class LengthBody(SocketBody):
    """A body of known length."""

    def __init__(self, source: Any, sock: Any, length: int) -> None:
        super().__init__(source, sock, length)
        self._reader = source.reader
        self._ended = self._reader.length == 0
        # Most small bodies arrive with their heads and need none.
        self._socket: BodySocket | None = None

    def wake(self) -> None:
        super().wake()
        if self._socket is not None:
            self._socket.wake()

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None = None) -> int | None:
        if self._ended or self._is_woken or self._reader.unreader.buf.tell():
            return None
        try:
            if self._continue is not None:
                self._send_continue()
            moved = self._opened().transfer(fd, offset, min(n, self._left), is_lost)
        except BaseException as error:
            self._source.failed = True
            if isinstance(error, ConnectionError):
                raise _broken_off(error) from error
            raise
        if moved is not None:
            self._count(moved)
        return moved

    def nudge(self) -> None:
        if self._socket is not None:
            self._socket.nudge()

    @property
    def _left(self) -> int:
        left: int = self._reader.length
        return left

    def _take(self, n: int, deadline: float | None) -> memoryview | bytes:
        n = min(n, self._reader.length)
        unreader = self._reader.unreader
        block: memoryview | bytes | None
        if unreader.buf.tell():
            buffered: bytes = unreader.take_buffered()
            block = buffered[:n]
            if len(buffered) > n:
                unreader.unread(buffered[n:])
        else:
            block = self._opened().receive(n, deadline)
        if block is None:
            return b""
        self._count(len(block))
        return block

    def _count(self, n: int) -> None:
        # gunicorn learns from it where the next request begins.
        self._reader.length -= n
        self._ended = self._reader.length == 0

    def _opened(self) -> BodySocket:
        if self._socket is None:
            self._socket = body_socket(self._sock)
            if self._is_woken:
                self._socket.wake()
        return self._socket


class ChunkedBody(SocketBody):
    """A chunked body. Its pieces are as large as what has arrived."""

    def __init__(self, source: Any, sock: Any) -> None:
        super().__init__(source, sock, None)
        self._reader = source.reader
        adopt_reader(self._reader)
        self._piece = memoryview(b"")

    def wake(self) -> None:
        super().wake()
        if isinstance(self._reader.parser, _ChunkParser):
            self._reader.parser.socket.wake()

    def trailer(self, name: str) -> str | None:
        for key, value in getattr(self._reader.req, "trailers", None) or ():
            if key.upper() == name.upper():
                return str(value)
        return None

    @property
    def _left(self) -> None:
        return None

    def _take(self, n: int, deadline: float | None) -> memoryview | bytes:
        while not self._piece and not self._is_woken:
            piece = self._next_piece(deadline)
            if piece == b"":
                self._reader.parser = None
                self._ended = True
                return b""
            if piece is not None:
                self._piece = memoryview(piece)
        taken = self._piece[:n]
        self._piece = self._piece[n:]
        return taken

    def _next_piece(self, deadline: float | None) -> bytes | None:
        parser = self._reader.parser
        try:
            if isinstance(parser, _ChunkParser):
                return parser.receive(deadline)
            # The application has begun to read the body by gunicorn's methods.
            piece: bytes = next(parser, b"")
            return piece
        except OSError:  # gunicorn's NoMoreData is one, too
            raise
        except TooLong as error:
            log.info("The trailers are too long: %s", error)
            raise BodyMalformed("The trailers of the request are too long.") from error
        except Exception as error:
            log.info("The body is malformed: %r", error)
            raise BodyMalformed from error


def _broken_off(error: OSError) -> BodyIncomplete:
    # The line of the request says so, too.
    log.debug("The body broke off: %r", error)
    return BodyIncomplete()


def adopt_reader(reader: Any) -> None:
    """Replace gunicorn's parser of a chunked body by ours, if nothing was read yet.

    :param reader: gunicorn's, of any kind.
    """
    readers = _readers()
    if readers is None or type(reader) is not readers.chunked:
        return
    if isgenerator(reader.parser) and getgeneratorstate(reader.parser) == GEN_CREATED:
        reader.parser = _ChunkParser(reader.req)


class _ChunkParser:
    """Yields the content of a chunked body, in place of gunicorn's parser.

    gunicorn's takes a step in Python for each chunk, keeps megabytes of trailers, and lets no
    other greenlet run as long as there are bytes.

    :param request: gunicorn's.
    """

    def __init__(self, request: Any) -> None:
        self.socket = body_socket(request.unreader.sock)
        self._request = request
        self._decoder = ChunkDecoder()

    def __iter__(self) -> _ChunkParser:
        return self

    def __next__(self) -> bytes:
        while (piece := self.receive()) is None:
            pass
        if not piece:
            raise StopIteration
        return piece

    def receive(self, deadline: float | None = None) -> bytes | None:
        """Receive once and return the content, ``None`` if there was none; empty at the end.

        :raises ValueError: if the body is malformed.
        :raises OSError: if it broke off.
        """
        decoder = self._decoder
        if decoder.error is None and decoder.trailers is None:
            piece = self._decode(deadline)
            if piece:
                return piece
        if decoder.error is not None:
            raise decoder.error
        return None if decoder.trailers is None else self._end(decoder.trailers)

    def _decode(self, deadline: float | None) -> bytes:
        decoder = self._decoder
        chunks = decoder.chunks
        received = self._request.unreader.take_buffered()
        if not received:
            n = max(_CHUNKED_BLOCK, min(decoder.left, BLOCK))
            received = self.socket.receive(n, deadline)
        if received is None:
            return b""
        piece = decoder.feed(bytes(received))
        self.socket.budget.spend((decoder.chunks - chunks) * CHUNK)
        return piece

    def _end(self, trailers: bytes) -> bytes:
        # The next request may have arrived already.
        rest = self._decoder.rest
        self._decoder.rest = b""
        self._request.unreader.unread(rest)
        if trailers:
            self._request.trailers = self._request.parse_headers(trailers, from_trailer=True)
        return b""
