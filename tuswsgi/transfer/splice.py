"""Moves bytes from a socket to a file inside the kernel (Linux' splice).

This file owns the pipe that such a move needs, and what happens when one of its ends
refuses. It never waits: the socket must not block, and between filling the pipe and
draining it no greenlet switches, so that one pipe serves a whole worker.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

from tuswsgi.core.process import PerProcess
from tuswsgi.transfer.reader import write_at

#: What the pipe is asked to hold; without privileges that is the most there is.
CAPACITY = 1024 * 1024

_F_SETPIPE_SZ = 1031

_MEANS_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

IS_SUPPORTED = sys.platform == "linux" and hasattr(os, "splice")


class Unsupported(Exception):
    """This socket or this file cannot be spliced; nothing was lost."""


class Pipe:
    """The pipe of one process."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self._writing, _F_SETPIPE_SZ, CAPACITY)
        except OSError:
            pass  # a user's pipes have a limit in all; 64 KiB will do

    def move(self, sock: int, file: int, offset: int, n: int) -> int:
        """Move up to `n` bytes that the socket has, to the file at `offset`.

        :returns: how many, 0 if the socket has come to its end.
        :raises BlockingIOError: if the socket has none now.
        :raises ConnectionError: if the socket is broken.
        :raises Unsupported: if the socket cannot be spliced.
        :raises OSError: if the file takes no more. What it did not take is lost: it had left
            the socket, and can be nowhere else.
        """
        flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
        try:
            filled = os.splice(sock, self._writing, n, flags=flags)
        except (BlockingIOError, ConnectionError):
            raise
        except OSError as error:
            raise Unsupported from error
        try:
            self._drain(file, offset, filled)
        except BaseException:
            self._discard()
            raise
        return filled

    def _drain(self, file: int, offset: int, n: int) -> None:
        left = n
        while left > 0:
            try:
                moved = os.splice(
                    self._reading, file, left, offset_dst=offset, flags=os.SPLICE_F_MOVE
                )
            except OSError as error:
                if error.errno not in _MEANS_UNSUPPORTED:
                    raise
                # A file system that cannot: what is in the pipe is written by hand.
                moved = write_at(file, os.read(self._reading, left), offset)
            offset += moved
            left -= moved

    def _discard(self) -> None:
        for fd in (self._reading, self._writing):
            os.close(fd)
        _pipes.pop()


_pipes: PerProcess[Pipe] = PerProcess(Pipe)


def pipe() -> Pipe:
    """Return the pipe of this process."""
    return _pipes.get()
