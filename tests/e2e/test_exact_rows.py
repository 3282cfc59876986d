"""Keep-alive: whatever was asked before on a connection, the next answer is the right one."""

from __future__ import annotations

import itertools
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from e2e.client import BYTES, TUS, Client, Connection, chunk, content, patch_headers, sha1
from e2e.conftest import SERVE, Server, running

KEPT = content(150_000, seed=2)
GROWING = content(25_000_000, seed=3)

#: More than gunicorn's parser reads at once, so that the body is moved past it.
LARGE = 50_000

Headers = dict[str, "str | int"]


@pytest.fixture(scope="module", params=["plain", "tls"])
def alone(
    request: pytest.FixtureRequest,
    tls_flags: tuple[list[str], ssl.SSLContext],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """A server with one worker."""
    flags, tls = tls_flags if request.param == "tls" else ([], None)
    data_dir = tmp_path_factory.mktemp("rows") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "1", *flags]
    with running(Server(command, data_dir, tls=tls)) as server:
        yield server


class Step(NamedTuple):
    """A request, and what its answer must be: a status, and an offset or a body."""

    wire: bytes
    status: int
    offset: int | None = None
    body: bytes | None = None


class Walk:
    """Makes the steps of one connection."""

    def __init__(self, client: Client, connection: Connection, version: str) -> None:
        self._connection = connection
        self._version = version
        self._kept = client.create(len(KEPT))
        client.finish(self._kept, KEPT)
        self._etag = client.get(self._kept).headers["etag"]
        self.path = client.create(len(GROWING))
        self.offset = 0

    def patch(self, size: int, kind: str = "length") -> Step:
        body = GROWING[self.offset : self.offset + size]
        headers = patch_headers(self.offset, None if kind == "chunked" else size)
        self.offset += size
        if kind == "checksum":
            headers["Upload-Checksum"] = sha1(body)
        if kind == "chunked":
            headers["Transfer-Encoding"] = "chunked"
            body = chunk(body[:1000]) + chunk(body[1000:]) + chunk(b"")
        return Step(self._wire("PATCH", self.path, headers, body), 204, offset=self.offset)

    def create(self, size: int) -> Step:
        headers = {**BYTES, "Upload-Length": size, "Content-Length": size}
        return Step(self._wire("POST", "/files/", headers, bytes(size)), 201, offset=size)

    def refused(self, size: int) -> Step:
        headers = patch_headers(self.offset + 1, size)
        wire = self._wire("PATCH", self.path, headers, b"HEAD / HTTP/1.1\r\n\r\n" * size)
        return Step(wire[: wire.index(b"\r\n\r\n") + 4 + size], 409, offset=self.offset)

    def head(self) -> Step:
        return Step(self._wire("HEAD", self.path, TUS), 200, offset=self.offset)

    def get(self) -> Step:
        return Step(self._wire("GET", self._kept, {}), 200, body=KEPT)

    def one_byte(self) -> Step:
        wire = self._wire("GET", self._kept, {"Range": "bytes=0-0"})
        return Step(wire, 206, body=KEPT[:1])

    def range(self) -> Step:
        wire = self._wire("GET", self._kept, {"Range": "bytes=1000-99999"})
        return Step(wire, 206, body=KEPT[1000:100_000])

    def not_modified(self) -> Step:
        return Step(self._wire("GET", self._kept, {"If-None-Match": self._etag}), 304)

    def beyond_the_end(self) -> Step:
        return Step(self._wire("GET", self._kept, {"Range": f"bytes={len(KEPT)}-"}), 416)

    def unknown(self, method: str) -> Step:
        return Step(self._wire(method, "/files/" + "0" * 32, TUS), 404)

    def options(self) -> Step:
        return Step(self._wire("OPTIONS", "/files/", {}), 204)

    def _wire(self, method: str, path: str, headers: Headers, body: bytes = b"") -> bytes:
        if self._version == "1.0":
            headers = {**headers, "Connection": "keep-alive"}
        return self._connection.head(method, path, headers, version=self._version) + body

    def check(self, step: Step) -> None:
        answer = self._connection.read()
        assert (answer.status, answer.closes) == (step.status, False)
        if step.offset is not None:
            assert answer.offset == step.offset
        if step.body is not None:
            assert answer.body == step.body


STEPS: dict[str, Callable[[Walk], Step]] = {
    "small patch": lambda walk: walk.patch(100),
    "large patch": lambda walk: walk.patch(LARGE),
    "chunked patch": lambda walk: walk.patch(LARGE, "chunked"),
    "small checksum": lambda walk: walk.patch(100, "checksum"),
    "large checksum": lambda walk: walk.patch(LARGE, "checksum"),
    "empty patch": lambda walk: walk.patch(0),
    "creation": lambda walk: walk.create(100),
    "large creation": lambda walk: walk.create(LARGE),
    "small refusal": lambda walk: walk.refused(100),
    "large refusal": lambda walk: walk.refused(LARGE),
    "HEAD": Walk.head,
    "GET": Walk.get,
    "one byte": Walk.one_byte,
    "range": Walk.range,
    "not modified": Walk.not_modified,
    "beyond the end": Walk.beyond_the_end,
    "unknown to HEAD": lambda walk: walk.unknown("HEAD"),
    "unknown to GET": lambda walk: walk.unknown("GET"),
    "options": Walk.options,
}


#: HTTP/1.0 has no chunks.
CHUNKED = ("chunked patch", "1.0")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
def test_any_after_any(alone: Server, version: str, at_once: bool) -> None:
    """Every pair of steps, all of them on one connection."""
    steps = {name: step for name, step in STEPS.items() if (name, version) != CHUNKED}
    with alone.client.connect() as connection:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        walk = Walk(alone.client, connection, version)
        for pair in itertools.product(steps, steps):
            if at_once:
                made = [steps[name](walk) for name in pair]
                connection.send(b"".join(step.wire for step in made))
                for step in made:
                    walk.check(step)
            else:
                for name in pair:
                    step = steps[name](walk)
                    connection.send(step.wire)
                    walk.check(step)
        connection.pause(0.02)
    assert alone.file(walk.path).read_bytes() == GROWING[: walk.offset]


def test_http_1_0_closes_unless_it_was_asked(alone: Server) -> None:
    client = alone.client
    path = client.create(len(KEPT))
    client.finish(path, KEPT)
    for method, headers in (("GET", {}), ("HEAD", TUS), ("GET", {"Range": "bytes=5-"})):
        with client.connect() as connection:
            connection.send_head(method, path, headers, version="1.0")
            assert connection.read().closes
            assert connection.is_closed()
