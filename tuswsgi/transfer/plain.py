"""The body of a request, got in the best way that its WSGI server allows.

This file owns the choice of that way, and the plain one that PEP 3333 grants. It and its
two neighbours hold everything that we know about servers' input; they do not know what the
bytes are for.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from tuswsgi.core.errors import BodyIncomplete
from tuswsgi.transfer.body import MOMENT, RequestBody
from tuswsgi.transfer.framing import content_length
from tuswsgi.transfer.gunicorn import gunicorn_body

log = logging.getLogger(__name__)


def body_of(environ: Mapping[str, Any]) -> RequestBody:
    """Return the body of a request in the best way that its server allows."""
    length = content_length(environ)
    if length == 0:
        return RequestBody(environ, 0)
    return gunicorn_body(environ, length) or PlainBody(environ, length)


class PlainBody(RequestBody):
    """A body from any WSGI server, read as PEP 3333 says."""

    def __init__(self, environ: Mapping[str, Any], length: int | None) -> None:
        super().__init__(environ, length)
        self._input = environ["wsgi.input"]
        self._remaining = length
        #: That of Flask's own server.
        self._sock: socket.socket | None = environ.get("werkzeug.socket")
        # read() waits for all it was asked for; where there is read1() it does not.
        self._read = getattr(self._input, "read1", self._input.read)
        if length is None and not environ.get("wsgi.input_terminated"):
            # Nobody says where the body ends.
            self._remaining = 0
            self.length = 0
            self._ended = True

    def receive(self, n: int) -> bytes:
        if self._ended or self._is_woken:
            return b""
        self._turns.give()
        n = min(n, 16 * 1024)
        if self._remaining is not None:
            n = min(n, self._remaining)
        block = self._read_block(n)
        self._turns.received(len(block))
        if self._remaining is not None:
            self._remaining -= len(block)
            if not block and self._remaining:
                raise BodyIncomplete
        self._ended = not block or self._remaining == 0
        return block

    @property
    def _left(self) -> int | None:
        return self._remaining

    def is_short(self) -> bool:
        if self._sock is None or self._is_given_up:
            return super().is_short()
        # Flask's own server ends each connection, but looks for more in its socket before that,
        # and if there is some it reads until the client closes.
        self._read_rest(MOMENT)
        return self._ended

    def _receive_until(self, deadline: float, n: int) -> bytes:
        if self._sock is not None and not _is_readable(self._sock, deadline - time.monotonic()):
            raise BodyIncomplete
        return self.receive(n)

    def _read_block(self, n: int) -> bytes:
        try:
            block: bytes = self._read(n)
        except Exception as error:
            # Whatever a server raises, the bytes do not come any more.
            log.info("The body broke off: %r", error)
            raise BodyIncomplete from error
        return block


def _is_readable(sock: socket.socket, seconds: float) -> bool:
    """Wait for bytes, and return whether there are any."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
