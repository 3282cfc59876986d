"""Sends the bytes of downloads, from file to socket inside the kernel where that works.

The plain way is an iterator of blocks, as PEP 3333 has it. Under gunicorn's gevent
workers a file is sent by sendfile(2) instead: gunicorn's own way of doing so ends in a
loop of reads and writes there.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tuswsgi.datastores.base import Readable
from tuswsgi.process import let_others_run

log = logging.getLogger(__name__)

_BLOCK = 256 * 1024

#: The most bytes that are sent before other greenlets get their turn.
_STEP = 1024 * 1024


class Content:
    """The bytes of a download.

    :param opened: what is read; its position is at the first byte that is wanted.
    :param length: how many bytes are wanted.
    :param patience: how long a client may take no bytes at all, in seconds.
    """

    def __init__(self, opened: Readable, length: int, patience: float) -> None:
        self.opened = opened
        self.length = length
        self.patience = patience

    def __iter__(self) -> Iterator[bytes]:
        left = self.length
        while left > 0:
            block = self.opened.read(min(_BLOCK, left))
            if not block:
                raise _too_short()
            left -= len(block)
            yield block

    def close(self) -> None:
        self.opened.close()

    def through(self, environ: Mapping[str, Any], start_response: object) -> Iterable[bytes]:
        """Return the fastest iterable of these bytes that the server allows."""
        sock = environ.get("gunicorn.socket")
        response = getattr(start_response, "__self__", None)
        if (
            sock is None
            or not hasattr(self.opened, "fileno")
            or not hasattr(os, "sendfile")
            or not type(sock).__module__.startswith("gevent.")
            or hasattr(sock, "context")  # TLS
            or f"{type(response).__module__}.{type(response).__name__}"
            != "gunicorn.http.wsgi.Response"
        ):
            return self
        return SentFile(self, sock, response)


class SentFile:
    """A download that goes from a file to gunicorn's socket."""

    def __init__(self, content: Content, sock: Any, response: Any) -> None:
        self._content = content
        self._sock = sock
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        # gunicorn sends the head for the first item, however short that is.
        yield b""
        self._send()
        # For gunicorn's access log; it has not seen these bytes.
        self._response.sent = self._content.length

    def close(self) -> None:
        self._content.close()

    def _send(self) -> None:
        from gevent import Timeout, get_hub

        file = self._content.opened.fileno()  # type: ignore[attr-defined]
        offset = os.lseek(file, 0, os.SEEK_CUR)
        end, unyielded = offset + self._content.length, 0
        with get_hub().loop.io(self._sock.fileno(), 2) as writable:
            while offset < end:
                try:
                    sent = os.sendfile(self._sock.fileno(), file, offset, min(_STEP, end - offset))
                except BlockingIOError:
                    with Timeout(self._content.patience, _too_slow()):
                        get_hub().wait(writable)
                    unyielded = 0
                    continue
                if sent == 0:
                    raise _too_short()
                offset += sent
                unyielded += sent
                if unyielded >= _STEP:
                    let_others_run()
                    unyielded = 0


def _too_short() -> OSError:
    # Only closing the connection tells the client; gunicorn does so quietly for EPIPE.
    log.error("The bytes of an upload ended too soon while it was sent")
    return BrokenPipeError(errno.EPIPE, "The bytes of the upload ended too soon")


def _too_slow() -> OSError:
    return BrokenPipeError(errno.EPIPE, "The client takes no bytes")
