"""Bodies of requests, from any WSGI server, and what becomes of a body that is not read.

A refusal is sent while the client still sends and before the rest of the body is read. The server
must not take the rest for the next request, and the client must get the chance to read the
response.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.errors import BadRequest, BodyIncomplete, BodyMalformed
from tuswsgi.core.info import MAX_SIZE
from tuswsgi.transfer.fairness import RECEIVE, Budget
from tuswsgi.transfer.reader import Body
from tuswsgi.transfer.sockets import LINGER_TIME, is_readable, linger

log = logging.getLogger(__name__)

#: The most bytes of an unread body that are read to keep a connection alive.
DRAIN_LIMIT = 256 * 1024

#: How long the end of a body of unknown length may take to arrive before a response is sent
#: (seconds).
_MOMENT = 0.1

#: Bytes that are read at once from servers whose ``read`` waits for all of them.
_BLOCK = 16 * 1024

#: int() takes no more digits, leading zeros included.
_MOST_DIGITS = 4300


class RequestBody(Body):
    """The body of a request, as ``web`` sees it.

    :param length: in bytes; ``None`` where the client has not told it.
    :param sock: the connection's socket, ``None`` where the server does not tell it.
    """

    def __init__(self, length: int | None, sock: Any = None) -> None:
        self.length = length
        self._sock = sock
        self._ended = length == 0
        self._is_woken = False

    def wake(self) -> None:
        self._is_woken = True

    @property
    def ended(self) -> bool:
        """Whether all of it was read, so that the next request may follow."""
        return self._ended

    def can_drain(self) -> bool:
        """Return whether the rest is short enough to be read after the response.

        The response has to say whether the connection is kept. To learn that of a rest of unknown
        length, what has arrived of it is read.
        """
        if self._ended or self._is_given_up:
            return self._ended
        if self._left is None:
            self._read_rest(_MOMENT)
            return self._ended
        return True

    def drain(self) -> None:
        """Read a short rest, so that the next request may follow.

        "A server MUST read the entire request message body or close the connection after
        sending its response" (RFC 9112, 9.3), and reading without a bound would be a cheap
        attack.
        """
        if not self._ended and not self._is_given_up:
            self._read_rest(LINGER_TIME)

    def linger(self) -> None:
        """Give a client that is still sending the chance to read the response."""
        if self._sock is not None:
            linger(self._sock)

    def abandon(self) -> None:
        """Keep the server from looking for another request in the rest."""

    @property
    @abstractmethod
    def _left(self) -> int | None:
        """The number of bytes still to come, ``None`` if it is unknown."""

    @property
    def _is_given_up(self) -> bool:
        """Whether the rest is too long to be read, or cannot be read."""
        return self._is_woken or (self._left or 0) > DRAIN_LIMIT

    @abstractmethod
    def _receive_until(self, deadline: float, n: int) -> memoryview | bytes:
        """Receive bytes as ``receive`` does.

        :param deadline: when to give up, on the monotonic clock.
        """

    def _read_rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        left = DRAIN_LIMIT
        try:
            while left > 0 and time.monotonic() < deadline:
                block = self._receive_until(deadline, left)
                if not block:
                    return
                left -= len(block)
        except (BodyIncomplete, BodyMalformed):
            pass  # the connection is closed then


class EmptyBody(RequestBody):
    """The body of a request that has none."""

    def __init__(self) -> None:
        super().__init__(0)

    def receive(self, n: int) -> bytes:
        return b""

    @property
    def _left(self) -> int:
        return 0

    def _receive_until(self, deadline: float, n: int) -> bytes:
        return b""


class PlainBody(RequestBody):
    """A body from any WSGI server, read as PEP 3333 says."""

    def __init__(self, environ: Mapping[str, Any], length: int | None, sock: Any) -> None:
        self._werkzeugs: Any = environ.get("werkzeug.socket")
        super().__init__(length, sock or self._werkzeugs)
        self._input = environ["wsgi.input"]
        self._remaining = length
        self._budget = Budget()
        # read() waits for all bytes that it is asked for; read1(), where there is one, does not.
        self._read = getattr(self._input, "read1", self._input.read)
        if length is None and not environ.get("wsgi.input_terminated"):
            # The server does not tell where the body ends.
            self._remaining = 0
            self.length = 0
            self._ended = True

    def receive(self, n: int) -> bytes:
        if self._ended or self._is_woken:
            return b""
        self._budget.share()
        n = min(n, _BLOCK)
        if self._remaining is not None:
            n = min(n, self._remaining)
        block = self._read_block(n)
        self._budget.spend(len(block) + RECEIVE)
        if self._remaining is not None:
            self._remaining -= len(block)
            if not block and self._remaining:
                raise BodyIncomplete
        self._ended = not block or self._remaining == 0
        return block

    def can_drain(self) -> bool:
        if self._werkzeugs is None or self._is_given_up:
            return super().can_drain()
        # Flask's development server closes each connection, but if there are unread bytes in its
        # socket, it reads until the client closes.
        self._read_rest(_MOMENT)
        return self._ended

    @property
    def _left(self) -> int | None:
        return self._remaining

    def _receive_until(self, deadline: float, n: int) -> bytes:
        seconds = deadline - time.monotonic()
        if self._werkzeugs is not None and not is_readable(self._werkzeugs, seconds):
            raise BodyIncomplete
        return self.receive(n)

    def _read_block(self, n: int) -> bytes:
        try:
            block: bytes = self._read(n)
        except Exception as error:
            # Servers raise errors of their own when the client is gone.
            log.info("The body broke off: %r", error)
            raise BodyIncomplete from error
        return block


def content_length(environ: Mapping[str, Any]) -> int | None:
    """Return ``Content-Length``; ``None`` for a chunked body, 0 for no body."""
    if "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
        return None
    text = environ.get("CONTENT_LENGTH") or "0"
    return decimal("Content-Length", text, BadRequest)


def decimal(name: str, text: str, error: type[BadRequest]) -> int:
    """Return the number of bytes in a header.

    :param name: the header's, for the message.
    :raises BadRequest: an `error` if the value is not a number up to 2^63-1.
    """
    # int() takes signs, blanks, underscores and digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise error(f"The {name} header is not a non-negative integer.")
    if len(text) > _MOST_DIGITS:
        raise error(f"The {name} header is longer than {_MOST_DIGITS} digits.")
    if len(text.lstrip("0")) > 19 or (number := int(text)) > MAX_SIZE:
        raise error(f"The {name} header is larger than 2^63-1.")
    return number
