"""What all bodies of requests have in common, above all: how to be rid of an unwanted rest.

A refusal is answered while the client still sends, and before the rest is read. That must not be
taken for the next request, and the client must get the chance to read the answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.errors import BodyIncomplete, BodyMalformed
from tuswsgi.core.process import PerProcess
from tuswsgi.transfer.reader import Body
from tuswsgi.transfer.turns import Turns

#: The most bytes that are taken from a socket at once.
BLOCK = 1024 * 1024

#: The most bytes of a body nobody wants that are read to keep a connection alive.
DRAIN_LIMIT = 256 * 1024

#: How long a client may take to send these bytes, and to notice an early answer (seconds).
DRAIN_TIME = 2.0

#: How long the end of a chunked body may take to arrive until an answer is sent (seconds).
MOMENT = 0.1

#: The most bytes that are thrown away after an early answer.
LINGER_LIMIT = 64 * 1024 * 1024

_TRUNCATE = socket.MSG_TRUNC if hasattr(socket, "MSG_TRUNC") else 0

#: One buffer serves all greenlets of a worker: none switches between fill and use.
_shared_buffer: PerProcess[memoryview] = PerProcess(lambda: memoryview(bytearray(BLOCK)))


def shared_buffer() -> memoryview:
    """Return the buffer of this process. What is in it is gone after the next switch."""
    return _shared_buffer.get()


class RequestBody(Body):
    """The body of a request without one, and the base of the others."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        self.length = length
        self._environ = environ
        self._ended = length == 0
        self._is_woken = False
        self._turns = Turns()

    def receive(self, n: int) -> memoryview | bytes:
        return b""

    def wake(self) -> None:
        self._is_woken = True

    @property
    def ended(self) -> bool:
        """Whether all of it was read, so that the next request may follow."""
        return self._ended

    def is_short(self) -> bool:
        """Return whether a rest that nobody wants is short, so that the connection can be kept.

        The answer, which is sent before the rest is read, has to say so. Where nobody knows how
        long the rest is, what has arrived of it is read, and what comes within a moment.
        """
        if self._ended or self._is_given_up:
            return self._ended
        if self._left is None:
            self._read_rest(MOMENT)
            return self._ended
        return True

    def drain(self) -> None:
        """Read a short rest that nobody wants, so that the next request may follow.

        "A server MUST read the entire request message body or close the connection after
        sending its response" (RFC 9112, 9.3), and reading without a bound would be a cheap
        attack.
        """
        if not self._ended and not self._is_given_up:
            self._read_rest(DRAIN_TIME)

    def _read_rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        rest = DRAIN_LIMIT
        try:
            while rest > 0 and time.monotonic() < deadline:
                block = self._receive_until(deadline, rest)
                if not block:
                    return
                rest -= len(block)
        except (BodyIncomplete, BodyMalformed):
            pass  # the connection is closed then

    def linger(self) -> None:
        """Let a client that is still sending read the answer, then give up on it."""
        sock = self._environ.get("gunicorn.socket") or self._environ.get("werkzeug.socket")
        if sock is not None:
            linger(sock)

    def abandon(self) -> None:
        """Make sure that the server does not look for another request in the rest."""

    @property
    def _left(self) -> int | None:
        """How many bytes are still to come, ``None`` if nobody knows."""
        return self.length

    @property
    def _is_given_up(self) -> bool:
        """Whether the rest is not worth reading, or cannot be read."""
        return self._is_woken or self._waits_for_continue or (self._left or 0) > DRAIN_LIMIT

    @property
    def _waits_for_continue(self) -> bool:
        return False

    def _receive_until(self, deadline: float, n: int) -> memoryview | bytes:
        return self.receive(n)


def linger(sock: Any) -> None:
    """Throw away what a client still sends after its answer, for a moment.

    Closing a socket with unread bytes sends a reset, which may take the answer from the client
    (RFC 9112, 9.6). So: close our half, read on for a while, and whoever calls this closes.
    """
    is_tls = hasattr(sock, "context")
    deadline = time.monotonic() + DRAIN_TIME
    rest = LINGER_LIMIT
    turns = Turns()
    try:
        if not is_tls:  # TLS knows no half-closed connections
            sock.shutdown(socket.SHUT_WR)
        while rest > 0 and (left := deadline - time.monotonic()) > 0:
            turns.give()
            sock.settimeout(left)
            # MSG_TRUNC: the kernel throws the bytes away without copying them.
            flags = 0 if is_tls else _TRUNCATE
            dropped = sock.recv_into(shared_buffer(), min(rest, BLOCK), flags)
            if dropped == 0:
                return
            rest -= dropped
            turns.received(dropped)
    except OSError:
        pass  # the client is gone
