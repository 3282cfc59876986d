"""Requests that arrive in pieces: every byte may be the last of its packet.

The server has one worker, so that each request goes the same way, and runs under each of
gunicorn's parsers.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from e2e.client import PATIENCE, TUS, Connection, chunk, content, patch_headers, sha1
from e2e.conftest import Server, running

ROOT = Path(__file__).parent.parent.parent

#: What gunicorn's parser reads at once.
BUFFER = 8192

SIZE = 10_000_000
DATA = content(SIZE)


#: Transport and parser. Only a unix socket tells that the other side has read all.
SERVERS = [("tcp", "python"), ("unix", "python"), ("unix", "fast")]


@pytest.fixture(scope="module", params=SERVERS, ids="-".join)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with one worker."""
    transport, parser = request.param
    if parser == "fast":
        _need_the_fast_parser()
    directory = tmp_path_factory.mktemp("alone")
    # What this process can import, the server can, too.
    paths = [str(ROOT), *filter(None, sys.path)]
    environ = {
        "TUSWSGI_DATA_DIR": str(directory / "data"),
        "TUSWSGI_WORKERS": "1",
        "TUSWSGI_HOST": "127.0.0.1",
        "TUSWSGI_PORT": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if transport == "unix":
        environ["TUSWSGI_UNIX_SOCK"] = str(directory / "tus.sock")
    command = [
        *(sys.executable, "-m", "gunicorn", "-c", str(ROOT / "conf" / "gunicorn.conf.py")),
        *("--chdir", str(ROOT), "--http-parser", parser, "wsgi:application"),
    ]
    with running(Server(command, directory / "data", environ)) as server:
        yield server


def _need_the_fast_parser() -> None:
    from gunicorn.http.message import _check_fast_parser

    try:
        _check_fast_parser(SimpleNamespace(http_parser="fast"))
    except RuntimeError as error:
        pytest.skip(str(error))


class Row:
    """PATCHes of one upload in a row, on one connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.path = server.client.create(SIZE)
        self.offset = 0
        self.connection = server.client.connect()
        if self.connection.sock.family == socket.AF_INET:
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def next_patch(self, size: int, *, kind: str = "length") -> bytes:
        """Return a request, whose head is as long as those of all others of its kind."""
        body, offset = DATA[self.offset : self.offset + size], self.offset
        self.offset += size
        headers = patch_headers(offset)
        if kind == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            first, second, third = body[:1], body[1:30], body[30:]
            extended = chunk(third).replace(b"\r\n", b' ; a=b;c="; d"\r\n', 1)
            end = b"0\r\nSome-Trailer: value\r\n\r\n"
            wire = chunk(first) + chunk(second) + extended + end
        else:
            headers["Content-Length"] = len(body)
            wire = body
        if kind == "checksum":
            headers["Upload-Checksum"] = sha1(body)
        headers["Pad"] = "." * (20 - len(f"{offset}{len(body)}"))
        return self.connection.head("PATCH", self.path, headers) + wire

    def next_head(self) -> bytes:
        return self.connection.head("HEAD", self.path, TUS)

    def send_in_pieces(self, wire: bytes, *cuts: int) -> None:
        """Send the bytes up to each cut, then those after it when these were read."""
        start = 0
        for cut in cuts:
            self.connection.send(wire[start:cut])
            wait_until_taken(self.connection)
            start = cut
        self.connection.send(wire[start:])

    def check(self, *expected: tuple[int, int]) -> None:
        """Read answers, of which the status and offset are told."""
        for status, offset in expected:
            answer = self.connection.read()
            assert (answer.status, answer.offset) == (status, offset)

    def end(self) -> None:
        """Compare what is on disk with what was sent."""
        self.connection.pause(0.02)
        self.connection.close()
        assert self._server.file(self.path).read_bytes() == DATA[: self.offset]


@pytest.fixture
def row(alone: Server) -> Iterator[Row]:
    row = Row(alone)
    with row.connection:
        yield row


def wait_until_taken(connection: Connection) -> None:
    """Wait until the server has read what was sent, or was likely to."""
    if connection.sock.family != socket.AF_UNIX:
        time.sleep(0.0005)
        return
    deadline = time.monotonic() + PATIENCE
    while any(fcntl.ioctl(connection.sock, termios.TIOCOUTQ, bytes(4))):
        assert time.monotonic() < deadline, "the server does not read"
        time.sleep(0.0001)


@pytest.mark.parametrize("kind", ["length", "chunked", "checksum"])
def test_a_cut_at_every_byte(row: Row, kind: str) -> None:
    cut, length = 1, 2
    while cut < length:
        wire = row.next_patch(60, kind=kind)
        row.send_in_pieces(wire, cut)
        row.check((204, row.offset))
        cut, length = cut + 1, len(wire)
    assert length > 250
    row.end()


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_a_pair_cut_at_every_byte(row: Row, kind: str) -> None:
    cut, length = 1, 2
    while cut < length:
        wire = row.next_patch(40, kind=kind) + row.next_head()
        row.send_in_pieces(wire, cut)
        row.check((204, row.offset), (200, row.offset))
        cut, length = cut + 1, len(wire)
    row.end()


def test_many_cuts(row: Row) -> None:
    """Now several pieces per request, the body larger than what the parser reads at once."""
    for number in range(150):
        kind = ("length", "chunked", "checksum")[number % 3]
        wire = row.next_patch(20_000, kind=kind) + row.next_head()
        cuts = sorted(random.sample(range(1, len(wire)), 4))
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            row.connection.send(wire[start:end])
            # No more than this: the rest of a large body may be left in the socket.
            time.sleep(random.choice((0, 0.001)))
        row.check((204, row.offset), (200, row.offset))
    row.end()


@pytest.mark.parametrize("kind", ["length", "chunked"])
def test_the_buffer_of_the_parser_ends_anywhere(row: Row, kind: str) -> None:
    """In the first body, in the head after it, in the second body, and at each seam."""
    empty = row.next_patch(0)
    row.connection.send(empty)
    row.check((204, 0))
    for size in range(BUFFER - 2 * len(empty) - 100, BUFFER - len(empty) + 50):
        wire = row.next_patch(size, kind=kind)
        middle = row.offset
        row.connection.send(wire + row.next_patch(50))
        row.check((204, middle), (204, row.offset))
    row.end()


@pytest.mark.parametrize("size", [9_000, 65_536, 300_000, 1_048_576, 1_500_000])
def test_the_next_request_is_not_taken_for_the_body(row: Row, size: int) -> None:
    """A large body goes past the parser, and what comes with its last bytes does not."""
    wire, expected = b"", []
    for length in (size - 1, size, size + 1):
        wire += row.next_patch(length) + row.next_head()
        expected += [(204, row.offset), (200, row.offset)]
    row.connection.send(wire)
    row.check(*expected)
    row.end()
