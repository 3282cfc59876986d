"""The pipe between socket and file: small, refused at either end, on a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuswsgi.transfer import sockets
from tuswsgi.transfer.sockets import Pipe, Unsupported, pipe

if not sockets.SPLICE_IS_SUPPORTED:
    pytest.skip("there is no splice here", allow_module_level=True)

#: As much as the buffers of any socket take at once.
DATA = bytes(range(256)) * 400

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """The client's and the server's end of a connection."""
    if request.param == "unix":
        client, server = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
    with client, server:
        server.setblocking(False)
        yield client, server


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def move(pipe: Pipe, sock: socket.socket, file: int, offset: int, n: int) -> int:
    """Move `n` bytes in as many steps as it takes, and return how many these were."""
    end, steps = offset + n, 0
    while offset < end:
        try:
            moved = pipe.move(sock.fileno(), file, offset, end - offset)
        except BlockingIOError:
            continue  # not all of it came over yet
        assert moved > 0
        offset, steps = offset + moved, steps + 1
    return steps


def stored(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def test_bytes_go_where_they_are_wanted(ends: Ends, file: int) -> None:
    client, server = ends
    client.sendall(DATA)
    move(pipe(), server, file, 0, 10)
    move(pipe(), server, file, 10, 5_000)
    move(pipe(), server, file, 100_000, len(DATA) - 5_010)
    assert stored(file)[:5_010] == DATA[:5_010]
    assert stored(file)[100_000:] == DATA[5_010:]


def test_a_small_pipe(ends: Ends, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PIPE_CAPACITY", 4096)
    client, server = ends
    client.sendall(DATA)
    small = Pipe()
    assert move(small, server, file, 0, len(DATA)) >= 2
    client.sendall(b"more")
    move(small, server, file, len(DATA), 4)
    assert stored(file) == DATA + b"more"


def test_a_pipe_that_cannot_be_enlarged(
    ends: Ends, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, command: int, size: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    client, server = ends
    client.sendall(DATA)
    move(Pipe(), server, file, 0, len(DATA))
    assert stored(file) == DATA


def test_a_file_that_cannot_be_spliced(ends: Ends, tmp_path: Path) -> None:
    client, server = ends
    client.sendall(DATA)
    # These refuse it with the error of file systems that cannot.
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        move(pipe(), server, fd, 0, len(DATA))
        assert stored(fd) == DATA
    finally:
        os.close(fd)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process become larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_gets_full_in_the_middle(ends: Ends, file: int) -> None:
    client, server = ends
    client.sendall(DATA)
    with largest_file(50_000), pytest.raises(OSError, match="File too large"):
        move(pipe(), server, file, 0, len(DATA))
    assert stored(file) == DATA[: len(stored(file))]
    drop(server)
    # Nothing of what the file did not take gets into the next one.
    os.truncate(file, 0)
    client.sendall(b"next" * 1000)
    move(pipe(), server, file, 0, 4000)
    assert stored(file) == b"next" * 1000


def drop(sock: socket.socket) -> None:
    """Throw away what a socket has."""
    try:
        while sock.recv(100_000):
            pass
    except BlockingIOError:
        pass


def test_a_full_disk_that_cannot_be_spliced_to(ends: Ends, file: int) -> None:
    client, server = ends
    client.sendall(b"lost")
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            move(pipe(), server, full, 0, 4)
    finally:
        os.close(full)
    client.sendall(b"next")
    move(pipe(), server, file, 0, 4)
    assert stored(file) == b"next"


def test_no_pipe_is_left_behind(ends: Ends) -> None:
    client, server = ends
    full = os.open("/dev/full", os.O_WRONLY)
    pipe()
    before = os.listdir("/proc/self/fd")
    try:
        for _ in range(5):
            client.sendall(b"lost")
            with pytest.raises(OSError, match="No space left"):
                move(pipe(), server, full, 0, 4)
            pipe()
        assert len(os.listdir("/proc/self/fd")) == len(before)
    finally:
        os.close(full)


def test_what_cannot_be_spliced_from_loses_nothing(file: int, tmp_path: Path) -> None:
    source = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(Unsupported):
            pipe().move(source, file, 0, 10)
    finally:
        os.close(source)
    assert stored(file) == b""


def test_the_end_of_a_connection(ends: Ends, file: int) -> None:
    client, server = ends
    with pytest.raises(BlockingIOError):
        pipe().move(server.fileno(), file, 0, 10)
    client.sendall(b"last")
    client.close()
    move(pipe(), server, file, 0, 4)
    assert stored(file) == b"last"
    assert pipe().move(server.fileno(), file, 4, 10) == 0


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_a_reset_comes_after_the_bytes_before_it(ends: Ends, file: int) -> None:
    client, server = ends
    client.sendall(DATA)
    # What arrived is on this side already when the reset comes.
    server.setblocking(True)
    assert server.recv(len(DATA), socket.MSG_PEEK | socket.MSG_WAITALL) == DATA
    server.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    move(pipe(), server, file, 0, len(DATA))
    assert stored(file) == DATA
    with pytest.raises(ConnectionError):
        pipe().move(server.fileno(), file, len(DATA), 10)


def test_connections_in_turn(tmp_path: Path) -> None:
    """One pipe serves them all."""
    pairs = [socket.socketpair() for _ in range(5)]
    files = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(5)]
    for turn in range(20):
        for number, ((client, server), file) in enumerate(zip(pairs, files, strict=True)):
            block = bytes([number, turn]) * (100 + number * turn)
            client.sendall(block)
            move(pipe(), server, file, os.fstat(file).st_size, len(block))
    for number, ((client, server), file) in enumerate(zip(pairs, files, strict=True)):
        client.close()
        server.close()
        assert stored(file) == b"".join(
            bytes([number, turn]) * (100 + number * turn) for turn in range(20)
        )
        os.close(file)
