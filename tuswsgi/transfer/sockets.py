"""Ways to receive from the socket of a connection so that the wait can be interrupted.

There is one class for each kind of socket: gevent's, gevent's with TLS, and those of threads.
They know nothing of HTTP and of the WSGI server.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import IsLost
from tuswsgi.transfer.fairness import RECEIVE, TURN, Budget
from tuswsgi.transfer.reader import write_at

T = TypeVar("T")

#: The most bytes that are received at once.
BLOCK = 1024 * 1024

#: The most bytes that are received at once in a thread, which has a buffer of its own.
_THREAD_BLOCK = 64 * 1024

#: The most bytes of TLS that are received at once: decrypted bytes are still in the processor's
#: cache when they are written.
_TLS_BLOCK = 256 * 1024

#: The most records of TLS that are received at once. A record may hold a single byte.
_TLS_RECORDS = 64

#: Bytes that the kernel gathers before it wakes a greenlet that splices: a slow stream would
#: wake it for every packet.
_LOW_WATER = 256 * 1024

#: How often a thread that waits for bytes looks whether it is interrupted (seconds).
_POLL_INTERVAL = 0.1

#: How long a client may take to notice an early response (seconds), and the most bytes that are
#: discarded meanwhile.
LINGER_TIME = 2.0
_LINGER_LIMIT = 64 * 1024 * 1024

#: The kernel discards the bytes without copying them.
_TRUNCATE = getattr(socket, "MSG_TRUNC", 0)

#: The capacity that the pipe is given: the most that is allowed without privileges.
PIPE_CAPACITY = 1024 * 1024
_F_SETPIPE_SZ = 1031

SPLICE_IS_SUPPORTED = sys.platform == "linux" and hasattr(os, "splice")
_MEANS_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

#: One buffer serves all greenlets of a worker: none switches between filling and using it.
_shared_buffer: PerProcess[memoryview] = PerProcess(lambda: memoryview(bytearray(BLOCK)))


class _Interrupted(BaseException):
    """Thrown into a greenlet that waits for bytes. Never leaves this module."""


class BodySocket(ABC):
    """A socket from which the body of a request is received.

    :ivar budget: the work that is done for this connection.
    """

    def __init__(self, sock: Any) -> None:
        self.budget = Budget()
        self._sock = sock
        self._is_woken = False

    @abstractmethod
    def receive(self, n: int, deadline: float | None = None) -> memoryview | None:
        """Wait for bytes and return 1 to `n` of them, ``None`` once ``wake`` was called.

        They are valid until the next switch of greenlets.

        :param deadline: when to give up, on the monotonic clock.
        :raises OSError: if the connection is broken or closed, or at the deadline.
        """

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None) -> int | None:
        """Wait for bytes and move 1 to `n` of them to a file inside the kernel.

        :param is_lost: called after each wait; nothing is moved if the lock is lost.
        :returns: how many, 0 once ``wake`` was called; ``None`` if this socket cannot do it.
        :raises ConnectionError: if the connection is broken or closed.
        :raises OSError: if the file takes no more bytes.
        """
        return None

    def nudge(self) -> None:
        """Make a waiting ``transfer`` take what has arrived, however little, and go on."""

    def wake(self) -> None:
        """End the current and every later wait. May be called from anywhere."""
        self._is_woken = True


class GeventSocket(BodySocket):
    """A socket of gevent's, which blocks nothing but the current greenlet."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self._greenlet: Any = None
        self._hub: Any = None
        self._low_water = 1
        self._splices = SPLICE_IS_SUPPORTED

    def receive(self, n: int, deadline: float | None = None) -> memoryview | None:
        self.budget.share()
        self._set_low_water(1)
        if deadline is not None:
            self._sock.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            buffer = _shared_buffer.get()
            received = self._interruptibly(lambda: self._receive_into(buffer, min(n, BLOCK)))
        finally:
            if deadline is not None:
                self._sock.settimeout(None)
        return None if received is None else buffer[:received]

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None) -> int | None:
        if not self._splices:
            return None
        self.budget.share()
        n = min(n, TURN)
        moved: int | None = 0
        try:
            moved = self._splice(fd, offset, n, is_lost)
            self.budget.spend(moved + RECEIVE)
        except Unsupported:
            self._splices = False
            moved = None
        finally:
            # Between the blocks of a slow stream the mark stays; other waits must not have it.
            if not moved or moved == n:
                self._set_low_water(1)
        return moved

    def nudge(self) -> None:
        if self._low_water > 1:
            self._interrupt()

    def wake(self) -> None:
        super().wake()
        self._interrupt()

    def _interruptibly(self, wait: Callable[[], T]) -> T | None:
        """Return the result of a function that waits, ``None`` if the wait was interrupted."""
        from gevent import get_hub, getcurrent

        self._hub = get_hub()
        self._greenlet = getcurrent()
        try:
            return None if self._is_woken else wait()
        except _Interrupted:
            return None
        finally:
            self._greenlet = None

    def _interrupt(self) -> None:
        if self._greenlet is not None:
            self._hub.loop.run_callback_threadsafe(self._throw)

    def _throw(self) -> None:
        # In the hub: the greenlet is in its wait, and gevent's sockets take bytes only after one,
        # so none is lost.
        if self._greenlet is not None:
            self._greenlet.throw(_Interrupted)

    def _receive_into(self, buffer: memoryview, n: int) -> int:
        received: int = self._sock.recv_into(buffer, n)
        if received == 0:
            raise closed()
        self.budget.spend(received + RECEIVE)
        return received

    def _splice(self, fd: int, offset: int, n: int, is_lost: IsLost | None) -> int:
        sock = self._sock.fileno()
        # A stream that was too slow for the last call has nothing to take yet.
        waits = self._low_water > 1
        while not self._is_woken:
            if waits:
                # The mark shrinks with the rest, or the last bytes would never reach it.
                self._set_low_water(min(_LOW_WATER, n))
                self._interruptibly(self._wait_readable)
                if self._is_woken or (is_lost is not None and is_lost()):
                    break
            try:
                moved = pipe().move(sock, fd, offset, n)
            except BlockingIOError:
                waits = True
                continue
            if moved == 0:
                raise closed()
            return moved
        return 0

    def _wait_readable(self) -> None:
        with self._hub.loop.io(self._sock.fileno(), 1) as readable:
            self._hub.wait(readable)

    def _set_low_water(self, n: int) -> None:
        if n != self._low_water:
            self._low_water = n
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)


class GeventTLSSocket(GeventSocket):
    """A socket of gevent's with TLS, which returns one record, 16 KiB, at a time."""

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None) -> int | None:
        return None

    def _receive_into(self, buffer: memoryview, n: int) -> int:
        n = min(n, _TLS_BLOCK)
        received = super()._receive_into(buffer, n)
        # Unlike gevent's own methods, that of Python's TLS object never waits.
        read = getattr(getattr(self._sock, "_sslobj", None), "read", None)
        records = 1
        try:
            while read is not None and records < _TLS_RECORDS and received < n:
                more = read(n - received, buffer[received:n])
                if not more:
                    break
                received += more
                records += 1
                self.budget.spend(more + RECEIVE)
        except OSError:
            pass  # no more has arrived, or the next wait raises what is wrong
        return received


class ThreadSocket(BodySocket):
    """A socket on which a thread waits."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self._buffer = memoryview(bytearray(_THREAD_BLOCK))

    def receive(self, n: int, deadline: float | None = None) -> memoryview | None:
        while not self._is_readable():
            if self._is_woken:
                return None
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        received = self._sock.recv_into(self._buffer, min(n, _THREAD_BLOCK))
        if received == 0:
            raise closed()
        return self._buffer[:received]

    def _is_readable(self) -> bool:
        """Wait a moment for bytes, and return whether there are any."""
        if hasattr(self._sock, "pending") and self._sock.pending():
            return True  # decrypted already
        return is_readable(self._sock, _POLL_INTERVAL)


def body_socket(sock: Any) -> BodySocket:
    """Return the way to receive a body from a socket of this kind."""
    if not is_gevents(sock):
        return ThreadSocket(sock)
    return GeventTLSSocket(sock) if is_tls(sock) else GeventSocket(sock)


def is_gevents(sock: Any) -> bool:
    return type(sock).__module__.startswith("gevent.")


def is_tls(sock: Any) -> bool:
    return hasattr(sock, "context")


def is_readable(sock: socket.socket, seconds: float) -> bool:
    """Wait for bytes, and return whether there are any."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def closed() -> ConnectionResetError:
    """Return the error of a connection that was closed in the middle of a body."""
    return ConnectionResetError(errno.ECONNRESET, "The connection was closed within the body")


def linger(sock: Any) -> None:
    """Discard what a client still sends after an early response, for a moment.

    Closing a socket with unread bytes sends a reset, which may take the response from the client
    (RFC 9112, 9.6). So close our half and read on; the caller closes the socket.
    """
    deadline = time.monotonic() + LINGER_TIME
    left = _LINGER_LIMIT
    budget = Budget()
    flags = 0 if is_tls(sock) else _TRUNCATE
    try:
        if not is_tls(sock):  # TLS has no half-closed connections
            sock.shutdown(socket.SHUT_WR)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        while left > 0 and (seconds := deadline - time.monotonic()) > 0:
            budget.share()
            sock.settimeout(seconds)
            discarded = sock.recv_into(_shared_buffer.get(), min(left, BLOCK), flags)
            if discarded == 0:
                return
            left -= discarded
            budget.spend(discarded + RECEIVE)
    except OSError:
        pass  # the client is gone


class Unsupported(Exception):
    """This socket cannot be spliced; nothing was lost."""


class Pipe:
    """The pipe through which a process moves bytes from sockets to files (Linux' splice).

    It never waits: the socket must not block, and no greenlet switches between filling and
    draining it, so that one pipe serves a whole worker.
    """

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(self._writing, _F_SETPIPE_SZ, PIPE_CAPACITY)
        except OSError:
            pass  # a user's pipes have a limit in all; 64 KiB will do

    def move(self, sock: int, file: int, offset: int, n: int) -> int:
        """Move up to `n` bytes that the socket has, to the file at `offset`.

        :returns: how many, 0 if the client has closed the connection.
        :raises BlockingIOError: if no bytes have arrived.
        :raises ConnectionError: if the connection is broken.
        :raises Unsupported: if the socket cannot be spliced.
        :raises OSError: if the file takes no more. The bytes that it did not take are lost: they
            have left the socket.
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
                # The file system cannot splice.
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
