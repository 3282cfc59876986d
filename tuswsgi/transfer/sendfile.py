"""Sends the bytes of downloads, from file to socket inside the kernel where that works.

The plain way is an iterator of blocks (PEP 3333). On a socket of gevent's a file is sent by
sendfile(2) instead: gunicorn's own way of doing so ends in a loop of reads and writes there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import termios
from collections.abc import Callable, Iterator
from typing import Any

from tuswsgi.core.process import let_others_run
from tuswsgi.datastores.base import Readable
from tuswsgi.transfer.sockets import is_tls

log = logging.getLogger(__name__)

_BLOCK = 256 * 1024

#: The most bytes that are sent before other greenlets run.
_STEP = 1024 * 1024


class Content:
    """The bytes of a download.

    :param opened: what is read; its position is at the first byte that is wanted.
    :param length: how many bytes are wanted.
    :param timeout: how long a client may take no bytes at all, in seconds.
    """

    def __init__(self, opened: Readable, length: int, timeout: float) -> None:
        self.opened = opened
        self.length = length
        self.timeout = timeout

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


class SentContent:
    """A download that is sent to a socket of gevent's, past the WSGI server.

    A client that takes no bytes for too long is given up: the kernel tells how many bytes wait
    for it.

    :param on_sent: called with the number of bytes, since the server has not seen them.
    """

    def __init__(self, content: Content, sock: Any, on_sent: Callable[[int], None]) -> None:
        self._content = content
        self._sock = sock
        self._on_sent = on_sent
        self._sent = 0
        self._progress = (0, 0)
        self._timer: Any = None

    def __iter__(self) -> Iterator[bytes]:
        from gevent import get_hub, getcurrent

        timeout = self._content.timeout
        self._timer = get_hub().loop.timer(timeout, timeout)
        self._timer.start(self._check_progress, getcurrent())
        # The server sends the head for the first item, however short that is.
        yield b""
        if _can_sendfile(self._sock) and hasattr(self._content.opened, "fileno"):
            self._send_file(self._content.opened.fileno())
        else:
            self._send_blocks()
        self._on_sent(self._sent)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._content.close()

    def _send_file(self, file: int) -> None:
        from gevent import get_hub

        start = os.lseek(file, 0, os.SEEK_CUR)
        since_yield = 0
        sock = self._sock.fileno()
        with get_hub().loop.io(sock, 2) as writable:
            while (left := self._content.length - self._sent) > 0:
                try:
                    sent = os.sendfile(sock, file, start + self._sent, min(_STEP, left))
                except BlockingIOError:
                    get_hub().wait(writable)
                    since_yield = 0
                    continue
                if sent == 0:
                    raise _too_short()
                self._sent += sent
                since_yield += sent
                if since_yield >= _STEP:
                    let_others_run()
                    since_yield = 0

    def _send_blocks(self) -> None:
        for block in self._content:
            rest = memoryview(block)
            while rest:
                sent = self._sock.send(rest)
                self._sent += sent
                rest = rest[sent:]
            let_others_run()

    def _check_progress(self, sender: Any) -> None:
        # In the hub. Whether the socket takes more bytes says too little: a slow client may have
        # to take megabytes until it does.
        progress = (self._sent, _unacknowledged_bytes(self._sock))
        if progress == self._progress and progress[1] > 0:
            sender.throw(BrokenPipeError(errno.EPIPE, "The client takes no bytes"))
        self._progress = progress


def _can_sendfile(sock: Any) -> bool:
    return hasattr(os, "sendfile") and not is_tls(sock)


def _unacknowledged_bytes(sock: Any) -> int:
    """Return how many bytes the kernel holds for the other side of a socket."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 1  # it does not tell


def _too_short() -> OSError:
    # Only closing the connection tells the client; gunicorn does so quietly for EPIPE.
    log.error("The bytes of an upload ended too soon while it was sent")
    return BrokenPipeError(errno.EPIPE, "The bytes of the upload ended too soon")
