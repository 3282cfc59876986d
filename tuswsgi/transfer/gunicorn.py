"""Bodies under gunicorn, taken from its socket itself.

gunicorn's own ``read`` waits for all bytes that it was asked for, loses them when a
connection breaks, and cannot be interrupted. This file leans on gunicorn's internals and
keeps their books, so that gunicorn finds the next request of the connection.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import time
from collections.abc import Callable, Mapping
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any, TypeVar

from tuswsgi.core.errors import BodyIncomplete, BodyMalformed
from tuswsgi.lockers.base import IsLost
from tuswsgi.transfer.body import BLOCK, RequestBody, shared_buffer
from tuswsgi.transfer.chunks import ChunkDecoder
from tuswsgi.transfer.lines import TooLong
from tuswsgi.transfer.splice import IS_SUPPORTED, Unsupported, pipe
from tuswsgi.transfer.turns import TURN, Turns

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes that are taken at once where the next chunks are not known to be larger.
_WIRE = 64 * 1024

#: How often a thread that waits for bytes looks whether it was woken (seconds).
_GLANCE = 0.1

#: Bytes that the kernel gathers before it wakes a greenlet that splices: a stream as slow
#: as real networks are would wake it for every packet.
_LOW_WATER = 256 * 1024


#: What is leaned on: attributes of objects of gunicorn's, by their class, and what these
#: objects can be made of to look at them.
_LENGTH_READER = "gunicorn.http.body:LengthReader"
_CHUNKED_READER = "gunicorn.http.body:ChunkedReader"
_INTERNALS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "gunicorn.http.unreader:SocketUnreader": ((None,), ("buf.tell", "take_buffered", "unread")),
    _LENGTH_READER: ((None, 1), ("length", "unreader")),
    _CHUNKED_READER: ((None, None), ("parser.__next__", "req")),
    "gunicorn.http.body:Body": ((None,), ("reader", "failed")),
    "gunicorn.http.wsgi:Response": ((None, None, None), ("sent", "force_close")),
}
_of_length_reader = attrgetter(
    "length", "unreader.buf.tell", "unreader.take_buffered", "unreader.unread"
)
_of_chunked_reader = attrgetter(
    "parser.__next__", "req.unreader.read", "req.unreader.unread", "req.parse_headers"
)

#: Bytes of TLS that are taken at once: what is decrypted is still in the processor's cache
#: when it is written.
_TLS_BLOCK = 256 * 1024

#: The most records of TLS that are taken at once: one may hold no more than a byte.
_TLS_RECORDS = 64

#: Of gevent's SSLSocket: reads what is there and never waits.
_of_tls = attrgetter("_sslobj.read")


class _Woken(BaseException):
    """Thrown where a greenlet or a thread waits for bytes. Never leaves this file."""


def missing_internals() -> list[str]:
    """Return what this gunicorn lacks of what is leaned on; bodies get the plain way then."""
    missing = []
    for path, (arguments, names) in _INTERNALS.items():
        try:
            made = resolve_name(path)(*arguments)
        except (ImportError, AttributeError, TypeError):
            made = None
        if _path(made) != path:
            missing.append(path)
            continue
        missing += [f"{path}.{name}" for name in names if not _has(made, attrgetter(name))]
    return [name.replace(":", ".") for name in missing]


def gunicorn_body(environ: Mapping[str, Any], length: int | None) -> GunicornBody | None:
    """Return a body of gunicorn's, ``None`` if it or the server is not as expected."""
    reader = getattr(environ["wsgi.input"], "reader", None)
    kind = _path(reader)
    if environ.get("gunicorn.socket") is None:
        return None
    if length is not None and kind == _LENGTH_READER and _has(reader, _of_length_reader):
        return SocketBody(environ, length)
    if length is None and kind == _CHUNKED_READER and _has(reader, _of_chunked_reader):
        return ChunkedBody(environ, None)
    return None


def is_read(source: Any) -> bool:
    """Return whether the next request of the connection may follow.

    :param source: gunicorn's body of the last one.
    """
    if source.failed:
        return False
    left = getattr(source.reader, "length", None)
    return left == 0 if left is not None else getattr(source.reader, "parser", source) is None


def finish(source: Any, sock: Any) -> bool:
    """Read the rest of a request's body that nobody wanted, if it is short.

    :param source: gunicorn's body; reading it has not failed yet.
    :returns: whether the next request of the connection may follow.
    """
    environ = {"wsgi.input": source, "gunicorn.socket": sock}
    body = gunicorn_body(environ, getattr(source.reader, "length", None))
    if body is None:
        return False
    body.drain()
    return body.ended


def _path(thing: object) -> str:
    return f"{type(thing).__module__}:{type(thing).__name__}"


def _has(thing: object, attributes: attrgetter[Any]) -> bool:
    try:
        attributes(thing)
    except AttributeError:
        return False
    return True


class GunicornBody(RequestBody):
    """What is common to bodies of gunicorn: waiting for its socket, interruptibly."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._input = environ["wsgi.input"]
        self._sock = environ["gunicorn.socket"]
        self._cooperative = type(self._sock).__module__.startswith("gevent.")
        self._greenlet: Any = None
        self._hub: Any = None
        self._deadline: float | None = None
        # Our worker leaves the 100 to us: it is sent when the body is first wanted.
        self._continue = getattr(self._input, "send_continue", None)

    def receive(self, n: int) -> memoryview | bytes:
        if self._ended or self._is_woken:
            return b""
        self._ask_to_continue()
        try:
            return self._wait_and_take(n)
        except BaseException:
            self._input.failed = True
            raise

    def wake(self) -> None:
        super().wake()
        self._end_wait()

    def _end_wait(self) -> None:
        if self._greenlet is not None:
            self._hub.loop.run_callback_threadsafe(self._throw)

    def abandon(self) -> None:
        self._input.failed = not self._ended

    @property
    def _waits_for_continue(self) -> bool:
        return self._continue is not None

    def _ask_to_continue(self) -> None:
        if self._continue is None:
            return
        ask = self._continue
        self._continue = None
        try:
            ask()
        except OSError as error:
            log.info("The client of a body that it shall send is gone: %s", error)
            self._input.failed = True
            raise BodyIncomplete from error

    def _wait_and_take(self, n: int) -> memoryview | bytes:
        while not self._is_woken:
            self._turns.give()
            self._heed_deadline()
            if self._cooperative:
                block = self._interruptibly(lambda: self._take(n))
            else:
                block = self._take_in_thread(n)
            if block is not None:
                return block
        return b""

    def _heed_deadline(self) -> None:
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BodyIncomplete
        self._sock.settimeout(left)

    def _interruptibly(self, action: Callable[[], T]) -> T | None:
        """Run what waits for the socket; ``None`` if ``wake`` or ``nudge`` ended it."""
        from gevent import get_hub, getcurrent

        self._hub = get_hub()
        self._greenlet = getcurrent()
        try:
            return action()
        except _Woken:
            return None
        finally:
            self._greenlet = None

    def _throw(self) -> None:
        # In the hub: while this is set the greenlet waits inside of _take, and gevent's
        # sockets take bytes only after a wait, so none is lost.
        if self._greenlet is not None:
            self._greenlet.throw(_Woken)

    def _receive_until(self, deadline: float, n: int) -> memoryview | bytes:
        self._deadline = deadline
        try:
            return self.receive(n)
        finally:
            self._deadline = None
            self._sock.settimeout(None)

    def _wait_in_thread(self) -> bool:
        """Wait for bytes in a thread of its own; return whether there are any."""
        if hasattr(self._sock, "pending") and self._sock.pending():
            return True
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        give_up = time.monotonic() + (self._sock.gettimeout() or float("inf"))
        while not poll.poll(_GLANCE * 1000):
            if self._is_woken or time.monotonic() > give_up:
                return False
        return True

    def _take_in_thread(self, n: int) -> memoryview | bytes | None:
        raise NotImplementedError

    def _take(self, n: int) -> memoryview | bytes | None:
        """Wait for bytes and take them; ``None`` if those that came carry none of the body."""
        raise NotImplementedError


class SocketBody(GunicornBody):
    """A body of known length, taken from gunicorn's socket."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._reader = self._input.reader
        self._ended = self._reader.length == 0
        self._own_buffer: memoryview | None = None
        is_tls = hasattr(self._sock, "context")
        self._splices = IS_SUPPORTED and self._cooperative and not is_tls
        self._fills_up = is_tls and self._cooperative and _has(self._sock, _of_tls)
        self._low_water = 1

    @property
    def _left(self) -> int:
        left: int = self._reader.length
        return left

    def _wait_and_take(self, n: int) -> memoryview | bytes:
        # A small body is here already, and there is nothing to wait for.
        return self._take(n) if self._has_buffered else super()._wait_and_take(n)

    def _take(self, n: int) -> memoryview | bytes:
        n = min(n, self._left, BLOCK)
        block = self._take_buffered(n) or self._take_from_socket(n)
        self._turns.received(len(block))
        # Keep-alive depends on this: it says where the next request begins.
        self._reader.length -= len(block)
        self._ended = self._reader.length == 0
        return block

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None = None) -> int | None:
        if not self._splices or self._has_buffered:
            return None
        self._ask_to_continue()
        self._turns.give()
        if self._ended or self._is_woken:
            return 0
        try:
            moved = self._splice(fd, offset, min(n, self._left, TURN), is_lost)
        except Unsupported:
            self._splices = False
            return None
        except BaseException:
            self._input.failed = True
            raise
        finally:
            self._set_low_water(1)
        self._turns.received(moved)
        self._reader.length -= moved
        self._ended = self._reader.length == 0
        return moved

    def nudge(self) -> None:
        if self._low_water > 1:
            self._end_wait()

    def _splice(self, fd: int, offset: int, n: int, is_lost: IsLost | None) -> int:
        sock = self._sock.fileno()
        while True:
            try:
                moved = pipe().move(sock, fd, offset, n)
            except BlockingIOError:
                if self._is_woken:
                    return 0
            except ConnectionError as error:
                log.info("The body broke off: %s", error)
                raise BodyIncomplete from error
            else:
                if moved == 0:
                    raise BodyIncomplete
                return moved
            # It must shrink with the rest, or the last bytes would never be enough.
            self._set_low_water(min(_LOW_WATER, n))
            self._interruptibly(self._wait_readable)
            if is_lost is not None and is_lost():
                return 0

    def _wait_readable(self) -> None:
        with self._hub.loop.io(self._sock.fileno(), 1) as readable:
            self._hub.wait(readable)

    def _set_low_water(self, n: int) -> None:
        if n != self._low_water:
            self._low_water = n
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)

    @property
    def _has_buffered(self) -> bool:
        return bool(self._reader.unreader.buf.tell())

    def _take_in_thread(self, n: int) -> memoryview | bytes:
        return self._take(n) if self._has_buffered or self._wait_in_thread() else b""

    def _take_buffered(self, n: int) -> bytes:
        unreader = self._reader.unreader
        if not self._has_buffered:
            return b""
        buffered: bytes = unreader.take_buffered()
        if len(buffered) > n:
            unreader.unread(buffered[n:])
        return buffered[:n]

    def _take_from_socket(self, n: int) -> memoryview:
        if self._cooperative:
            buffer = shared_buffer()
        elif self._own_buffer is None:
            buffer = self._own_buffer = memoryview(bytearray(64 * 1024))
        else:
            buffer = self._own_buffer
        n = min(n, len(buffer), _TLS_BLOCK if self._fills_up else n)
        try:
            received = self._sock.recv_into(buffer, n)
        except OSError as error:
            log.info("The body broke off: %s", error)
            raise BodyIncomplete from error
        if received == 0:
            raise BodyIncomplete
        if self._fills_up:
            received = self._fill_up(buffer, received, n)
        return buffer[:received]

    def _fill_up(self, buffer: memoryview, received: int, n: int) -> int:
        """Take what else has arrived: TLS hands out one record, 16 KiB, at a time."""
        read = _of_tls(self._sock)
        records = 1
        try:
            while records < _TLS_RECORDS and received < n:
                more = read(n - received, buffer[received:n])
                if not more:
                    break
                received = received + more
                records = records + 1
        except OSError:
            pass  # nothing more is there, or the next call to wait will say what is wrong
        self._turns.received(0, times=records - 1)
        return received


class ChunkedBody(GunicornBody):
    """A chunked body, taken from gunicorn's socket in pieces as large as what has arrived."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._reader = self._input.reader
        self._piece = memoryview(b"")
        take_over(self._reader)
        if isinstance(self._reader.parser, _Chunks):
            self._turns = self._reader.parser.turns

    def trailer(self, name: str) -> str | None:
        for key, value in getattr(self._reader.req, "trailers", None) or ():
            if key.upper() == name.upper():
                return str(value)
        return None

    def _take_in_thread(self, n: int) -> memoryview | bytes | None:
        # Only the parser knows whether it needs more bytes to go on.
        unreader = self._reader.req.unreader
        unreader.sock = _InterruptibleSocket(self._sock, self._wait_in_thread)
        try:
            return self._take(n)
        except _Woken:
            return b""
        finally:
            unreader.sock = self._sock

    def _take(self, n: int) -> memoryview | bytes | None:
        if not self._piece:
            piece = self._next_piece()
            if piece is None:
                return None
            self._piece = memoryview(piece)
        taken = self._piece[:n]
        self._piece = self._piece[n:]
        return taken

    def _next_piece(self) -> bytes | None:
        parser = self._reader.parser
        try:
            # Somebody else may have begun to read the body in gunicorn's way.
            piece = parser.receive() if isinstance(parser, _Chunks) else next(parser, b"")
        except OSError as error:  # gunicorn's NoMoreData is one, too
            log.info("The body broke off: %r", error)
            raise BodyIncomplete from error
        except TooLong as error:
            log.info("The trailers are too long: %s", error)
            raise BodyMalformed("The trailers of the request are too long.") from error
        except Exception as error:
            log.info("The body is malformed: %r", error)
            raise BodyMalformed from error
        if piece == b"":
            self._reader.parser = None
            self._ended = True
        return piece


def take_over(reader: Any) -> None:
    """Let a chunked body be read by us, whoever is going to read it, unless it has begun.

    :param reader: gunicorn's.
    """
    if _path(reader) != _CHUNKED_READER or not _has(reader, _of_chunked_reader):
        return
    if isgenerator(reader.parser) and getgeneratorstate(reader.parser) == GEN_CREATED:
        reader.parser = _Chunks(reader.req)


class _Chunks:
    """Yields the pieces of a chunked body, in the place of gunicorn's parser.

    That one takes a step in Python for each chunk, keeps megabytes of trailers, and lets nobody
    else run as long as there are bytes.

    :param request: gunicorn's.
    """

    def __init__(self, request: Any) -> None:
        self.turns = Turns()
        self._request = request
        self._decoder = ChunkDecoder()

    def __iter__(self) -> _Chunks:
        return self

    def __next__(self) -> bytes:
        while (piece := self.receive()) is None:
            pass
        if not piece:
            raise StopIteration
        return piece

    def receive(self) -> bytes | None:
        """Receive once and return what that carried, ``None`` for nothing yet; empty at the end.

        :raises ValueError: if the body is malformed.
        :raises OSError: if it broke off.
        """
        decoder = self._decoder
        if decoder.error is None and decoder.trailers is None and (piece := self._feed()):
            return piece
        if decoder.error is not None:
            raise decoder.error
        return None if decoder.trailers is None else self._end(decoder.trailers)

    def _feed(self) -> bytes:
        self.turns.give()
        decoder = self._decoder
        chunks = self._decoder.chunks
        wire = self._request.unreader.read(None, read_ahead=max(_WIRE, min(decoder.left, BLOCK)))
        if not wire:
            raise ConnectionResetError(errno.ECONNRESET, "The body ended within a chunk")
        piece = decoder.feed(wire)
        self.turns.received(len(wire), chunks=decoder.chunks - chunks)
        return piece

    def _end(self, trailers: bytes) -> bytes:
        # Keep-alive depends on this: the next request may have arrived already.
        rest = self._decoder.rest
        self._decoder.rest = b""
        self._request.unreader.unread(rest)
        if trailers:
            self._request.trailers = self._request.parse_headers(trailers, from_trailer=True)
        return b""


class _InterruptibleSocket:
    """A socket that does not receive before `wait` says that there is something."""

    def __init__(self, sock: socket.socket, wait: Callable[[], bool]) -> None:
        self._sock = sock
        self._wait = wait

    def recv(self, n: int) -> bytes:
        if not self._wait():
            raise _Woken
        return self._sock.recv(n)
