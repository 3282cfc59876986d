"""The load: what clients do, at the least cost that a client can have.

Bodies go from memory to the socket and downloads from the socket to nowhere inside the
kernel; small requests are built beforehand. This file knows neither processes nor figures.
Each call ends within ``LIMIT`` and raises ``Failed`` if it is not answered as it should be,
so that no error is ever measured as speed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import heapq
import mmap
import multiprocessing
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.bench.wire import PATIENCE, Answer, Failed, Target, ask, expect, is_whole, receive, whole

#: How many seconds one call may take.
LIMIT = 300.0

_SOURCE_SIZE = 32 * 1024 * 1024
_PUSH = 1024 * 1024
#: What a paced stream sends at once: what a network card hands over at 10 MB/s and more.
_PACED_PUSH = 16 * 1024
#: Some servers show no upload without a name and a type.
METADATA = {"Upload-Metadata": "filename YmVuY2g=,filetype YXBwbGljYXRpb24vb2N0ZXQtc3RyZWFt"}


class Upload(NamedTuple):
    """An upload that was created.

    :ivar headers: of the request that fills it.
    """

    path: str
    size: int
    headers: Mapping[str, object] = {}


def options(target: Target) -> Answer:
    """Ask what the server can do."""
    return target.ask(target.request("OPTIONS"), 200, 204)


def create(target: Target, size: int, count: int = 1, **headers: object) -> list[Upload]:
    """Create empty uploads."""
    headers = {"Upload-Length": size, "Content-Length": 0, **METADATA, **headers}
    request = target.request("POST", **headers)
    deadline = _deadline()
    uploads = []
    with target.connect() as connection:
        for _ in range(count):
            _check(deadline)
            uploads.append(Upload(_create(connection, request), size))
    return uploads


def concatenate(target: Target, parts: Sequence[Upload]) -> Upload:
    """Create an upload of others, and return once it is whole."""
    deadline = _deadline()
    size = sum(part.size for part in parts)
    concat = "final;" + " ".join(part.path for part in parts)
    with target.connect() as connection:
        request = target.request("POST", Upload_Concat=concat, Content_Length=0, **METADATA)
        path = _create(connection, request)
        while _offset(connection, target, path) != size:
            _check(deadline)
            time.sleep(0.001)
    return Upload(path, size)


def delete(target: Target, upload: Upload) -> None:
    """Ask for an upload's removal; the server may refuse."""
    request = target.request("DELETE", upload.path, Content_Length=0)
    target.ask(request, *range(200, 500))


def checksum(size: int) -> tuple[str, float]:
    """Return the ``Upload-Checksum`` of an upload's content, and the seconds that it took."""
    hash = hashlib.sha1(usedforsecurity=False)
    with mmap.mmap(_source(), _SOURCE_SIZE) as content, memoryview(content) as view:
        start = time.perf_counter()
        for position in range(0, size, _PUSH):
            offset = position % _SOURCE_SIZE
            hash.update(view[offset : offset + min(_PUSH, size - position)])
        seconds = time.perf_counter() - start
    return f"sha1 {base64.b64encode(hash.digest()).decode()}", seconds


def send(target: Target, uploads: Sequence[Upload]) -> None:
    """Fill uploads at once, one connection each, as fast as they are taken."""
    (_send_plain if target.scheme == "http" else _send_encrypted)(target, uploads)


def _send_plain(target: Target, uploads: Sequence[Upload]) -> None:
    deadline = _deadline()
    with _streams(target, uploads) as streams, select.epoll() as poll:
        waiting = {stream.socket.fileno(): stream for stream in streams}
        for number in waiting:
            poll.register(number, select.EPOLLIN | select.EPOLLOUT)
        while waiting:
            _check(deadline)
            for number, event in poll.poll(1.0):
                stream = waiting[number]
                if event & select.EPOLLOUT and not stream.push(_PUSH):
                    poll.modify(number, select.EPOLLIN)
                if event & ~select.EPOLLOUT and stream.answered():
                    poll.unregister(number)
                    del waiting[number]


def send_paced(target: Target, uploads: Sequence[Upload], rate: float) -> None:
    """Fill uploads at once, one connection each, at ``rate`` bytes per second each."""
    deadline = _deadline()
    interval = _PACED_PUSH / rate
    with _streams(target, uploads) as streams:
        start = time.monotonic()
        due = [(start + interval * n / len(streams), n) for n in range(len(streams))]
        while due:
            moment, number = heapq.heappop(due)
            _check(deadline)
            time.sleep(max(0.0, moment - time.monotonic()))
            if streams[number].push(_PACED_PUSH):
                heapq.heappush(due, (moment + interval, number))
        for stream in streams:
            stream.socket.settimeout(PATIENCE)
            while not stream.answered():
                _check(deadline)


@contextmanager
def sending(target: Target, uploads: Sequence[Upload]) -> Iterator[Callable[[], bool]]:
    """Fill uploads in another process; yields what tells whether it still does."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_send_aside, args=(target, uploads))
    process.start()
    try:
        yield process.is_alive
        process.join(LIMIT)
        if process.exitcode != 0:
            raise Failed("The uploads in the background failed.")
    finally:
        process.kill()
        process.join()


def download(target: Target, upload: Upload) -> None:
    """Get an upload's content, and drop it in the kernel."""
    deadline = _deadline()
    buffer = bytearray(_PUSH)
    with target.connect() as connection:
        connection.sendall(target.request("GET", upload.path))
        received = b""
        while b"\r\n\r\n" not in received:
            received += receive(connection)
        answer = expect(received, 200)
        if answer.header("Content-Length") != str(upload.size):
            raise Failed(f"GET was answered with {answer.header('Content-Length')!r} bytes.")
        left = upload.size - (len(received) - len(answer.head) - 4)
        while left:
            _check(deadline)
            count = connection.recv_into(buffer, min(left, _PUSH), socket.MSG_TRUNC)
            if not count:
                raise Failed("The connection was closed in the middle of a download.")
            left -= count


def repeat(target: Target, requests: Sequence[bytes], seconds: float, *statuses: int) -> int:
    """Send each request again and again on a connection of its own; return the answers."""
    count = 0
    with _connections(target, len(requests)) as connections, select.epoll() as poll:
        state = {c.fileno(): (c, request) for c, request in zip(connections, requests, strict=True)}
        partial = dict.fromkeys(state, b"")
        for number, (connection, request) in state.items():
            poll.register(number, select.EPOLLIN)
            connection.sendall(request)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for number, _ in poll.poll(1.0):
                connection, request = state[number]
                answer = partial[number] + receive(connection)
                if is_whole(answer, request):
                    expect(answer, *statuses)
                    count += 1
                    answer = b""
                    connection.sendall(request)
                partial[number] = answer
    return count


def latencies(
    target: Target, request: bytes, pause: float, busy: Callable[[], bool], *statuses: int
) -> list[float]:
    """Send a request once, and again while ``busy``; return the seconds that each took."""
    deadline = _deadline()
    times: list[float] = []
    with target.connect() as connection:
        while not times or busy():
            _check(deadline)
            start = time.perf_counter()
            ask(connection, request, *statuses)
            times.append(time.perf_counter() - start)
            time.sleep(pause)
    return times


@contextmanager
def trickling(target: Target, uploads: Sequence[Upload], seconds: float) -> Iterator[None]:
    """Hold connections, each in the middle of a body, after ``seconds`` of a byte each."""
    with _connections(target, len(uploads)) as connections:
        for connection, upload in zip(connections, uploads, strict=True):
            connection.sendall(target.patch(upload.path, upload.size))
        for _ in range(round(seconds)):
            start = time.monotonic()
            for position, connection in enumerate(connections):
                late = start + position / len(connections) - time.monotonic()
                if late > 0.001:
                    time.sleep(late)
                connection.send(b"x")
        open_ones = sum(map(_is_open, connections))
        if open_ones < len(connections):
            raise Failed(f"Only {open_ones} of {len(connections)} connections were kept.")
        yield


class _Stream:
    """A connection that fills one upload."""

    def __init__(self, target: Target, upload: Upload) -> None:
        self.socket = target.connect()
        self._left = self._size = upload.size
        self._position = 0
        self._answer = b""
        self._request = target.patch(upload.path, upload.size, **upload.headers)
        self.socket.sendall(self._request)
        self.socket.setblocking(False)

    def push(self, most: int) -> bool:
        """Send up to ``most`` bytes, as far as they are taken; tell whether some are left."""
        try:
            while most and self._left:
                count = min(most, self._left, _SOURCE_SIZE - self._position)
                count = os.sendfile(self.socket.fileno(), _source(), self._position, count)
                self._position = (self._position + count) % _SOURCE_SIZE
                self._left -= count
                most -= count
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise Failed("The connection was closed in the middle of a body.") from error
        return self._left > 0

    def answered(self) -> bool:
        """Read, and tell whether the upload was acknowledged."""
        self._answer += receive(self.socket)
        if not is_whole(self._answer, self._request):
            return False
        offset = expect(self._answer, 200, 204).header("Upload-Offset")
        if self._left or offset != str(self._size):
            raise Failed(f"{offset} of {self._size} bytes were acknowledged.")
        return True


@contextmanager
def _streams(target: Target, uploads: Sequence[Upload]) -> Iterator[list[_Stream]]:
    with ExitStack() as stack:
        streams = []
        for upload in uploads:
            streams.append(_Stream(target, upload))
            stack.callback(streams[-1].socket.close)
        yield streams


@contextmanager
def _connections(target: Target, count: int) -> Iterator[list[socket.socket]]:
    deadline = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        connections: list[socket.socket] = []
        while len(connections) < count:
            if time.monotonic() > deadline:
                raise Failed(
                    f"After {PATIENCE:.0f} s only {len(connections)} connections were open."
                )
            connections.append(stack.enter_context(target.connect()))
        yield connections


def _send_encrypted(target: Target, uploads: Sequence[Upload]) -> None:
    deadline = _deadline()
    with mmap.mmap(_source(), _SOURCE_SIZE) as content, memoryview(content) as view:
        for upload in uploads:
            request = target.patch(upload.path, upload.size)
            with target.connect() as connection:
                connection.sendall(request)
                for start in range(0, upload.size, _PUSH):
                    _check(deadline)
                    position = start % _SOURCE_SIZE
                    length = min(_PUSH, upload.size - start)
                    connection.sendall(view[position : position + length])
                expect(whole(connection, request), 200, 204)


def _send_aside(target: Target, uploads: Sequence[Upload]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        send(target, uploads)
    except (Failed, OSError):
        raise SystemExit(1) from None


@functools.cache
def _source() -> int:
    """Return a descriptor of random bytes in memory."""
    number = os.memfd_create("bench")
    os.ftruncate(number, _SOURCE_SIZE)
    with mmap.mmap(number, _SOURCE_SIZE) as content:
        content.write(os.urandom(_SOURCE_SIZE))
    return number


def _create(connection: socket.socket, request: bytes) -> str:
    location = ask(connection, request, 201).header("Location")
    if not location:
        raise Failed("POST was answered without a Location.")
    return urlsplit(location).path


def _offset(connection: socket.socket, target: Target, path: str) -> int:
    answer = ask(connection, target.request("HEAD", path), 200, 204)
    return int(answer.header("Upload-Offset") or -1)


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    # An answer in the middle of the body is a refusal.
    return False


def _deadline() -> float:
    return time.monotonic() + LIMIT


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise Failed(f"It took more than {LIMIT:.0f} s.")
