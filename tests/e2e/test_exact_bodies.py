"""Bodies, byte for byte: how they are cut into chunks, how they trickle, how they end."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from e2e.client import TUS, Client, Connection, chunk, content, wait_until
from e2e.conftest import SERVE, Serve, Server, running

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one worker, which looks after silent bodies each 5 s only."""
    data_dir = tmp_path_factory.mktemp("bodies") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "1", "--network-timeout", "1d"]
    with running(Server(command, data_dir)) as server:
        yield server


@contextmanager
def body_of(
    client: Client, path: str, offset: int, length: int | None, **headers: str
) -> Iterator[Connection]:
    """Send the head of a PATCH and wait until the server waits for its body."""
    headers["Expect"] = "100-continue"
    with client.start_patch(path, offset, length, **headers) as connection:
        assert connection.read_interim() == 100
        yield connection


def wait_until_arrived(connection: Connection) -> None:
    """Wait until all that was sent is in the hands of the server, or of its kernel."""

    def unacknowledged() -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(connection.sock, termios.TIOCOUTQ, bytes(4)))
        return int(count)

    wait_until(lambda: unacknowledged() == 0, "an acknowledgement")


EXTENSIONS = [b"", b";a", b" ; a=b", b';a="; \\" b";c', b";a=b\t;d"]


def odd_chunk(data: bytes) -> bytes:
    """Encode a chunk as nobody does, but may."""
    length = random.choice([b"%x", b"%X", b"%08x", b"000%X"]) % len(data)
    return length + random.choice(EXTENSIONS) + b"\r\n" + data + b"\r\n"


@pytest.mark.parametrize(
    "sizes", [[1], [1, 2, 3, 7], [8191], [8192], [8193, 1], [65_536], [MIB - 1, MIB + 1]]
)
def test_odd_chunks(alone: Server, sizes: list[int]) -> None:
    data = content(min(sizes[-1] * 400, 3 * MIB))
    path = alone.client.create(len(data))
    wire, start = b"", 0
    while start < len(data):
        size = random.choice(sizes)
        wire, start = wire + odd_chunk(data[start : start + size]), start + size
    wire += random.choice([b"0\r\n\r\n", b"000;x\r\nA: b\r\nC: d\r\n\r\n"])
    with alone.client.start_patch(path, 0, None) as connection:
        connection.send(wire + connection.head("HEAD", path, TUS))
        assert connection.read().offset == len(data)
        assert connection.read().offset == len(data)
    assert alone.file(path).read_bytes() == data


@pytest.mark.parametrize("algorithm", ["sha1", "crc32"])
@pytest.mark.parametrize("block", [8192, 65_536, MIB, 2 * MIB])
def test_checksums_around_the_size_of_a_block(alone: Server, algorithm: str, block: int) -> None:
    for size in (block - 1, block, block + 1):
        data = content(size)
        path = alone.client.create(size)
        for sent, status in ((data[:-1] + b"x", 460), (data, 204)):
            checksum = f"{algorithm} {b64encode(digest(algorithm, data)).decode()}"
            with body_of(alone.client, path, 0, size, Upload_Checksum=checksum) as connection:
                connection.send(sent + connection.head("HEAD", path, TUS))
                assert connection.read().status == status
                assert connection.read().offset == (size if status == 204 else 0)
        assert alone.file(path).read_bytes() == data


def digest(algorithm: str, data: bytes) -> bytes:
    if algorithm == "crc32":
        return zlib.crc32(data).to_bytes(4, "big")
    return hashlib.new(algorithm, data).digest()


@pytest.mark.parametrize("bulk", [0, 1000, 256 * 1024 - 3, 256 * 1024 + 1, MIB, 3 * MIB - 1])
def test_the_last_bytes_are_not_waited_for_in_vain(alone: Server, bulk: int) -> None:
    """The kernel gathers bytes before it wakes the server, but never more than are to come."""
    data = content(bulk + 4)

    def time_to_the_answer() -> float:
        path = alone.client.create(len(data))
        with body_of(alone.client, path, 0, len(data)) as connection:
            connection.send(data[:bulk])
            for byte in data[bulk:]:
                wait_until_arrived(connection)
                connection.send(bytes([byte]))
            sent = time.monotonic()
            answer = connection.read()
            assert (answer.status, answer.offset) == (204, len(data))
            return time.monotonic() - sent

    # One that waits in vain looks again 5 s after the start. One that is slow is not always so.
    assert any(time_to_the_answer() < 2.5 for _ in range(3))


#: The silence that the server of these tests takes for an end, in seconds.
TIMEOUT = 2.0


@pytest.fixture
def impatient(serve: Serve) -> Server:
    return serve("--network-timeout", f"{TIMEOUT}s", workers=1)


def test_slow_streams_are_alive(impatient: Server) -> None:
    client, data = impatient.client, content(2_000)
    kinds: list[tuple[bool, dict[str, str]]] = [
        (False, {}),
        (False, {"Upload_Checksum": "sha1 " + b64encode(digest("sha1", data)).decode()}),
        (True, {}),
    ]
    with ExitStack() as stack:
        bodies = []
        for chunked, headers in kinds:
            path = client.create(len(data))
            length = None if chunked else len(data)
            connection = stack.enter_context(body_of(client, path, 0, length, **headers))
            bodies.append((path, connection, chunk if chunked else bytes))
        for start in range(9):
            for _, connection, encode in bodies:
                connection.send(encode(data[start : start + 1]))
            time.sleep(0.3)
        for path, connection, encode in bodies:
            connection.send(encode(data[9:]) + (chunk(b"") if encode is chunk else b""))
            answer = connection.read()
            assert (answer.status, answer.offset) == (204, len(data))
            assert impatient.file(path).read_bytes() == data


@contextmanager
def stopped(worker: int) -> Iterator[None]:
    """Let a process do nothing for a while."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def test_a_server_that_was_held_up_does_not_blame_its_clients(impatient: Server) -> None:
    client, data = impatient.client, content(500_000)
    path = client.create(len(data))
    with body_of(client, path, 0, len(data)) as connection:
        with stopped(impatient.worker_of(connection)):
            connection.send(data[:1_000])
            time.sleep(1.5 * TIMEOUT)
            wait_until_arrived(connection)
        connection.pause(0.3)
        connection.send(data[1_000:])
        assert connection.read().status == 204
    assert client.get(path).body == data


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_what_the_kernel_has_is_not_lost(alone: Server, reset: bool) -> None:
    """The end of a connection is known before the bytes in front of it were read."""
    data = content(5 * MIB)
    path, offset = alone.client.create(len(data)), 0
    worker = alone.workers()[0]
    for _ in range(12):
        with body_of(alone.client, path, offset, len(data) - offset) as connection:
            count = random.randint(1, 60_000)
            with stopped(worker):
                connection.send(data[offset : offset + count])
                wait_until_arrived(connection)
                connection.reset() if reset else connection.close()
        offset += count
        wait_until(lambda end=offset: alone.stored(path) == end, "all bytes that had arrived")
        assert alone.client.offset(path) == offset
    alone.client.finish(path, data)
    assert alone.client.get(path).body == data


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_large_bodies_that_break_off(alone: Server, reset: bool) -> None:
    data = content(40 * MIB)
    path, offset = alone.client.create(len(data)), 0
    for cut in sorted(random.sample(range(len(data)), 8)):
        with body_of(alone.client, path, offset, len(data) - offset) as connection:
            connection.send(data[offset:cut])
            if reset:
                wait_until_arrived(connection)
            connection.reset() if reset else connection.close()
        wait_until(lambda end=cut: alone.stored(path) == end, "all bytes that had arrived")
        offset = alone.client.offset(path)
        assert offset == cut
    alone.client.finish(path, data)
    assert digest("sha1", alone.file(path).read_bytes()) == digest("sha1", data)


#: What a process needs to be exempt from the limits on pipes.
PRIVILEGES = "-sys_resource,-sys_admin"

#: Takes all that this user's pipes may hold in all, says so, and takes what others return.
TAKE_ALL_PIPES = """
import fcntl, os, time
pipes, told = [], False
while len(pipes) < 2000:
    pipes.append(os.pipe())
    try:
        fcntl.fcntl(pipes[-1][1], 1031, 1 << 20)
    except OSError:
        if not told:
            print("taken", flush=True)
        told = True
        for fd in pipes.pop():
            os.close(fd)
        time.sleep(0.001)
"""


@contextmanager
def all_pipes_taken(unprivileged: list[str]) -> Iterator[None]:
    command = [*unprivileged, sys.executable, "-c", TAKE_ALL_PIPES]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as taker:
        assert taker.stdout is not None
        try:
            if taker.stdout.readline() != b"taken\n":
                pytest.skip("here the pipes of a user have no limit")
            yield
        finally:
            taker.kill()


def largest_pipe(worker: int) -> int:
    sizes = []
    for link in Path(f"/proc/{worker}/fd").iterdir():
        try:
            fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue  # a socket, or closed a moment ago
        if os.readlink(link).startswith("pipe:"):
            sizes.append(fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ))
        os.close(fd)
    return max(sizes)


def test_without_privileges_a_small_pipe_will_do(tmp_path: Path) -> None:
    unprivileged = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv, which takes privileges away, is not installed")
        unprivileged = ["setpriv", f"--bounding-set={PRIVILEGES}"]
    command = [*unprivileged, *SERVE, "--data-dir", str(tmp_path), "--workers", "1"]
    data = content(20 * MIB)
    with all_pipes_taken(unprivileged), running(Server(command, tmp_path)) as server:
        path = server.client.create(len(data))
        with body_of(server.client, path, 0, len(data)) as connection:
            connection.send(data[: 5 * MIB])
            wait_until(lambda: server.stored(path) > MIB, "bytes on disk")
            if largest_pipe(server.workers()[0]) >= MIB:
                pytest.skip("somebody else returned pipes in the meantime")
        server.client.finish(path, data)
        assert server.client.get(path).body == data
