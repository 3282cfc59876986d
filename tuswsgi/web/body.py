"""Everything we know about how WSGI servers hand over the body of a request.

Under gunicorn the body is taken from the socket itself: its own ``read`` waits for all
bytes that it was asked for, loses them when a connection breaks, and cannot be
interrupted. Other servers, and everything that is not as expected, get the plain path.
This file knows sockets and servers; it does not know what the bytes are for.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tuswsgi.errors import BodyIncomplete, BodyMalformed
from tuswsgi.process import PerProcess
from tuswsgi.protocol.headers import content_length
from tuswsgi.protocol.reader import Body
from tuswsgi.web.pipe import IS_SUPPORTED, Unsupported, pipe

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The most bytes that are taken from a socket at once, and after which other greenlets
#: of the worker get their turn: a fast client would starve them otherwise.
_BLOCK = 1024 * 1024

#: The most bytes of a body nobody wants that are read to keep a connection alive.
DRAIN_LIMIT = 256 * 1024

#: How long a client may take to send these bytes, and to notice an early answer (seconds).
DRAIN_TIME = 2.0

#: The most bytes that are thrown away after an early answer.
LINGER_LIMIT = 64 * 1024 * 1024

#: How often a thread that waits for bytes looks whether it was woken (seconds).
_GLANCE = 0.1


class _Woken(BaseException):
    """Thrown into a greenlet that waits for bytes. Never leaves this file."""


#: Bytes that the kernel gathers before it wakes a greenlet that splices: a stream as slow
#: as real networks are would wake it for every packet.
_LOW_WATER = 256 * 1024


def body_of(environ: Mapping[str, Any]) -> RequestBody:
    """Return the body of a request in the best way that its server allows."""
    length = content_length(environ)
    if length == 0:
        return RequestBody(environ, 0)
    source, sock = environ["wsgi.input"], environ.get("gunicorn.socket")
    reader = getattr(source, "reader", None)
    kind = f"{type(reader).__module__}.{type(reader).__name__}"
    if sock is not None and length is not None and kind == "gunicorn.http.body.LengthReader":
        return SocketBody(environ, length)
    if sock is not None and length is None and kind == "gunicorn.http.body.ChunkedReader":
        return ChunkedBody(environ, None)
    return PlainBody(environ, length)


class RequestBody(Body):
    """The body of a request without one, and the base of the others."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        self.length = length
        self._environ = environ
        self._ended = length == 0
        self._is_woken = False

    def receive(self, n: int) -> memoryview | bytes:
        return b""

    def wake(self) -> None:
        self._is_woken = True

    @property
    def ended(self) -> bool:
        """Whether all of it was read, so that the next request may follow."""
        return self._ended

    def drain(self) -> None:
        """Read a short rest that nobody wants, so that the connection can be kept.

        "A server that does not read the whole body must close the connection" (RFC 9112,
        9.3), but reading without a bound would be a cheap attack.
        """
        if self._ended or self._is_woken or self._waits_for_continue:
            return
        if (self._left or 0) > DRAIN_LIMIT:
            return
        deadline, rest = time.monotonic() + DRAIN_TIME, DRAIN_LIMIT
        try:
            while rest > 0 and time.monotonic() < deadline:
                block = self._receive_until(deadline, rest)
                if not block:
                    return
                rest -= len(block)
        except (BodyIncomplete, BodyMalformed):
            pass  # the connection is closed then

    def linger(self) -> None:
        """Let a client that is still sending read the answer, then give up on it.

        Closing a socket with unread bytes sends a reset, which may take the answer from
        the client (RFC 9112, 9.6). So: close our half, read on for a moment, close.
        """
        sock = self._environ.get("gunicorn.socket") or self._environ.get("werkzeug.socket")
        if sock is None:
            return
        is_tls = hasattr(sock, "context")
        deadline, rest = time.monotonic() + DRAIN_TIME, LINGER_LIMIT
        try:
            if not is_tls:  # TLS knows no half-closed connections
                sock.shutdown(socket.SHUT_WR)
            while rest > 0 and (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                # MSG_TRUNC: the kernel throws the bytes away without copying them.
                flags = 0 if is_tls else _TRUNCATE
                dropped = sock.recv_into(_buffer(), min(rest, _BLOCK), flags)
                if dropped == 0:
                    return
                rest -= dropped
        except OSError:
            pass  # the client is gone

    def abandon(self) -> None:
        """Make sure that the server does not look for another request in the rest."""

    @property
    def _left(self) -> int | None:
        """How many bytes are still to come, ``None`` if nobody knows."""
        return self.length

    @property
    def _waits_for_continue(self) -> bool:
        return False

    def _receive_until(self, deadline: float, n: int) -> memoryview | bytes:
        return self.receive(n)


_TRUNCATE = socket.MSG_TRUNC if hasattr(socket, "MSG_TRUNC") else 0

#: One buffer serves all greenlets of a worker: none switches between fill and use.
_shared_buffer: PerProcess[memoryview] = PerProcess(lambda: memoryview(bytearray(_BLOCK)))


def _buffer() -> memoryview:
    return _shared_buffer.get()


class PlainBody(RequestBody):
    """A body from any WSGI server, read as PEP 3333 says."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._input = environ["wsgi.input"]
        self._remaining = length
        # read() waits for all it was asked for; where there is read1() it does not.
        self._read = getattr(self._input, "read1", self._input.read)
        if length is None and not environ.get("wsgi.input_terminated"):
            # Nobody says where the body ends.
            self._remaining, self.length, self._ended = 0, 0, True

    def receive(self, n: int) -> bytes:
        if self._ended or self._is_woken:
            return b""
        n = min(n, 16 * 1024)
        if self._remaining is not None:
            n = min(n, self._remaining)
        block = self._read_block(n)
        if self._remaining is not None:
            self._remaining -= len(block)
            if not block and self._remaining:
                raise BodyIncomplete
        self._ended = not block or self._remaining == 0
        return block

    @property
    def _left(self) -> int | None:
        return self._remaining

    def _read_block(self, n: int) -> bytes:
        try:
            block: bytes = self._read(n)
        except Exception as error:
            # Whatever a server raises, the bytes do not come any more.
            log.info("The body broke off: %r", error)
            raise BodyIncomplete from error
        return block


class _GunicornBody(RequestBody):
    """What is common to bodies of gunicorn: waiting for its socket, interruptibly."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._input = environ["wsgi.input"]
        self._sock = environ["gunicorn.socket"]
        self._cooperative = type(self._sock).__module__.startswith("gevent.")
        self._greenlet: Any = None
        self._hub: Any = None
        self._since_yield = 0
        # Our worker leaves the 100 to us: it is sent when the body is first wanted.
        self._continue = getattr(self._input, "send_continue", None)

    def receive(self, n: int) -> memoryview | bytes:
        if self._ended or self._is_woken:
            return b""
        self._ask_to_continue()
        try:
            block = self._wait_and_take(n)
        except BaseException:
            self._input.failed = True
            raise
        self._since_yield += len(block)
        return block

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
        if self._continue is not None:
            self._continue()
            self._continue = None

    def _wait_and_take(self, n: int) -> memoryview | bytes:
        if not self._cooperative:
            return self._take(n) if self._wait_in_thread() else b""
        self._give_others_a_turn()
        while not self._is_woken:
            block = self._interruptibly(lambda: self._take(n))
            if block is not None:
                return block
        return b""

    def _give_others_a_turn(self) -> None:
        if self._since_yield >= _BLOCK:
            self._since_yield = 0
            time.sleep(0)

    def _interruptibly(self, action: Callable[[], T]) -> T | None:
        """Run what waits for the socket; ``None`` if ``wake`` or ``nudge`` ended it."""
        from gevent import get_hub, getcurrent

        self._hub, self._greenlet = get_hub(), getcurrent()
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
        self._sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return self.receive(n)
        finally:
            self._sock.settimeout(None)

    def _wait_in_thread(self) -> bool:
        """Wait for bytes in a thread of its own; return whether there are any."""
        if self._has_buffered or (hasattr(self._sock, "pending") and self._sock.pending()):
            return True
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        give_up = time.monotonic() + (self._sock.gettimeout() or float("inf"))
        while not poll.poll(_GLANCE * 1000):
            if self._is_woken or time.monotonic() > give_up:
                return False
        return True

    @property
    def _has_buffered(self) -> bool:
        return bool(self._input.reader.unreader.buf.tell())

    def _take(self, n: int) -> memoryview | bytes:
        raise NotImplementedError


class SocketBody(_GunicornBody):
    """A body of known length, taken from gunicorn's socket."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._reader = self._input.reader
        self._ended = self._reader.length == 0
        self._own_buffer: memoryview | None = None
        self._splices = IS_SUPPORTED and self._cooperative and not hasattr(self._sock, "context")
        self._low_water = 1

    @property
    def _left(self) -> int:
        left: int = self._reader.length
        return left

    def _take(self, n: int) -> memoryview | bytes:
        n = min(n, self._left, _BLOCK)
        block = self._take_buffered(n) or self._take_from_socket(n)
        # Keep-alive depends on this: it says where the next request begins.
        self._reader.length -= len(block)
        self._ended = self._reader.length == 0
        return block

    def transfer(self, fd: int, offset: int, n: int) -> int | None:
        if not self._splices or self._has_buffered:
            return None
        self._ask_to_continue()
        self._give_others_a_turn()
        if self._ended or self._is_woken:
            return 0
        try:
            moved = self._splice(fd, offset, min(n, self._left))
        except Unsupported:
            self._splices = False
            return None
        except BaseException:
            self._input.failed = True
            raise
        finally:
            self._set_low_water(1)
        self._since_yield += moved
        self._reader.length -= moved
        self._ended = self._reader.length == 0
        return moved

    def nudge(self) -> None:
        if self._low_water > 1:
            self._end_wait()

    def _splice(self, fd: int, offset: int, n: int) -> int:
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

    def _wait_readable(self) -> None:
        with self._hub.loop.io(self._sock.fileno(), 1) as readable:
            self._hub.wait(readable)

    def _set_low_water(self, n: int) -> None:
        if n != self._low_water:
            self._low_water = n
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)

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
            buffer = _buffer()
        elif self._own_buffer is None:
            buffer = self._own_buffer = memoryview(bytearray(64 * 1024))
        else:
            buffer = self._own_buffer
        try:
            received = self._sock.recv_into(buffer, min(n, len(buffer)))
        except OSError as error:
            log.info("The body broke off: %s", error)
            raise BodyIncomplete from error
        if received == 0:
            raise BodyIncomplete
        return buffer[:received]


class ChunkedBody(_GunicornBody):
    """A chunked body, taken piece by piece from gunicorn's parser."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._reader = self._input.reader
        self._piece = memoryview(b"")

    def trailer(self, name: str) -> str | None:
        for key, value in getattr(self._reader.req, "trailers", None) or ():
            if key.upper() == name.upper():
                return str(value)
        return None

    def _take(self, n: int) -> memoryview | bytes:
        while not self._piece:
            try:
                self._piece = memoryview(next(self._reader.parser))
            except StopIteration:
                self._reader.parser = None
                self._ended = True
                return b""
            except OSError as error:  # gunicorn's NoMoreData is one, too
                log.info("The body broke off: %r", error)
                raise BodyIncomplete from error
            except Exception as error:
                log.info("The body is malformed: %r", error)
                raise BodyMalformed from error
        taken, self._piece = self._piece[:n], self._piece[n:]
        return taken
