"""Sends the bytes of downloads, from file to socket inside the kernel where that works.

The plain way is an iterator of blocks, as PEP 3333 has it. Under gunicorn's gevent
workers a file is sent by sendfile(2) instead: gunicorn's own way of doing so ends in a
loop of reads and writes there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import termios
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tuswsgi.core.process import let_others_run
from tuswsgi.datastores.base import Readable

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
        if type(sock).__module__.startswith("gevent.") and _is_gunicorns(response):
            return _SentContent(self, sock, response)
        return self


class _SentContent:
    """A download that goes to gunicorn's socket, past gunicorn.

    A client that takes nothing for too long is given up: the kernel says how many bytes
    wait for it.
    """

    def __init__(self, content: Content, sock: Any, response: Any) -> None:
        self._content = content
        self._sock = sock
        self._response = response
        self._sent = 0
        self._seen = (0, 0)
        self._timer: Any = None

    def __iter__(self) -> Iterator[bytes]:
        from gevent import get_hub, getcurrent

        patience = self._content.patience
        self._timer = get_hub().loop.timer(patience, patience)
        self._timer.start(self._look, getcurrent())
        # gunicorn sends the head for the first item, however short that is.
        yield b""
        if _is_plain(self._sock) and hasattr(self._content.opened, "fileno"):
            self._send_file(self._content.opened.fileno())
        else:
            self._send_blocks()
        # For gunicorn's access log; it has not seen these bytes.
        self._response.sent = self._sent

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._content.close()

    def _send_file(self, file: int) -> None:
        from gevent import get_hub

        start = os.lseek(file, 0, os.SEEK_CUR)
        unyielded = 0
        sock = self._sock.fileno()
        with get_hub().loop.io(sock, 2) as writable:
            while (left := self._content.length - self._sent) > 0:
                try:
                    sent = os.sendfile(sock, file, start + self._sent, min(_STEP, left))
                except BlockingIOError:
                    get_hub().wait(writable)
                    unyielded = 0
                    continue
                if sent == 0:
                    raise _too_short()
                self._sent += sent
                unyielded += sent
                if unyielded >= _STEP:
                    let_others_run()
                    unyielded = 0

    def _send_blocks(self) -> None:
        for block in self._content:
            rest = memoryview(block)
            while rest:
                sent = self._sock.send(rest)
                self._sent += sent
                rest = rest[sent:]
            let_others_run()

    def _look(self, sender: Any) -> None:
        # In the hub. That the socket takes more would not tell it: a slow client may have
        # to take megabytes until it does.
        seen = (self._sent, _waiting_bytes(self._sock))
        if seen == self._seen and seen[1] > 0:
            sender.throw(BrokenPipeError(errno.EPIPE, "The client takes no bytes"))
        self._seen = seen


def _is_gunicorns(response: object) -> bool:
    names = [f"{base.__module__}.{base.__name__}" for base in type(response).__mro__]
    return "gunicorn.http.wsgi.Response" in names


def _is_plain(sock: Any) -> bool:
    return hasattr(os, "sendfile") and not hasattr(sock, "context")


def _waiting_bytes(sock: Any) -> int:
    """Return how many bytes the kernel holds for the other side of a socket."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 1  # it does not tell


def _too_short() -> OSError:
    # Only closing the connection tells the client; gunicorn does so quietly for EPIPE.
    log.error("The bytes of an upload ended too soon while it was sent")
    return BrokenPipeError(errno.EPIPE, "The bytes of the upload ended too soon")
