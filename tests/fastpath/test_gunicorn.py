"""gunicorn's internals: what is leaned on is there, and nothing breaks where it is not."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.http import body as bodies
from gunicorn.http import unreader, wsgi

from tuswsgi.core.errors import BodyIncomplete, BodyMalformed
from tuswsgi.transfer import gunicorn
from tuswsgi.transfer.body import PlainBody, RequestBody
from tuswsgi.transfer.exchange import body_of
from tuswsgi.transfer.gunicorn import (
    ChunkedBody,
    LengthBody,
    adopt_reader,
    is_read,
    missing_internals,
)

DATA = bytes(range(256)) * 200

Environ = dict[str, Any]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Change gunicorn, which is looked at once in each process."""

    def look_again() -> None:
        gunicorn.missing_internals.cache_clear()
        gunicorn._readers.cache_clear()

    look_again()
    yield monkeypatch
    monkeypatch.undo()
    look_again()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """The server's end of a connection; `DATA` and the next request have been sent to it."""
    client, server = socket.socketpair()
    with client, server:
        client.sendall(DATA + b"HEAD ")
        yield server


@pytest.fixture
def chunked() -> Iterator[socket.socket]:
    """Likewise, in chunks."""
    client, server = socket.socketpair()
    with client, server:
        client.sendall(b"%x;ext\r\n%b\r\n0\r\nTrailer: x\r\n\r\nHEAD " % (len(DATA), DATA))
        yield server


def with_length(source: object, sock: socket.socket | None) -> Environ:
    environ = {"wsgi.input": source, "gunicorn.socket": sock, "CONTENT_LENGTH": str(len(DATA))}
    return environ | {"REQUEST_METHOD": "PATCH"}


def with_chunks(source: object, sock: socket.socket | None) -> Environ:
    environ = {"wsgi.input": source, "gunicorn.socket": sock, "wsgi.input_terminated": True}
    return environ | {"REQUEST_METHOD": "PATCH", "HTTP_TRANSFER_ENCODING": "chunked"}


def request(source: unreader.Unreader) -> Any:
    return SimpleNamespace(unreader=source, parse_headers=lambda data, from_trailer: [])


def read(body: RequestBody) -> bytes:
    received = b""
    while block := body.receive(10_000):
        received += bytes(block)
    assert body.ended
    return received


def rest_of(source: unreader.Unreader) -> bytes:
    """Return what gunicorn will take for the next request."""
    rest: bytes = source.read()
    return rest


def test_this_gunicorn_is_as_expected(sock: socket.socket, chunked: socket.socket) -> None:
    assert missing_internals() == ()
    source = unreader.SocketUnreader(sock)
    body = body_of(with_length(bodies.Body(bodies.LengthReader(source, len(DATA))), sock))
    assert type(body) is LengthBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "
    source = unreader.SocketUnreader(chunked)
    body = body_of(with_chunks(bodies.Body(bodies.ChunkedReader(request(source), source)), chunked))
    assert type(body) is ChunkedBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


@pytest.mark.parametrize("buffered", [1, 9_999, 10_000, 10_001, len(DATA), len(DATA) + 5])
def test_what_the_parser_had_read_already(sock: socket.socket, buffered: int) -> None:
    source = unreader.SocketUnreader(sock)
    source.unread(sock.recv(buffered, socket.MSG_WAITALL))
    body = body_of(with_length(bodies.Body(bodies.LengthReader(source, len(DATA))), sock))
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


class OtherReader(bodies.LengthReader):  # type: ignore[misc]
    """What a gunicorn to come may use."""


class ChunkedReader(bodies.ChunkedReader):  # type: ignore[misc]
    """Keeps its parser elsewhere."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._parser = self.__dict__.pop("parser")

    def read(self, size: int) -> bytes:
        data: bytes = next(self._parser, b"")
        return data


ChunkedReader.__module__ = "gunicorn.http.body"


def test_no_reader(sock: socket.socket) -> None:
    body = body_of(with_length(io.BytesIO(DATA + b"HEAD "), sock))
    assert type(body) is PlainBody
    assert read(body) == DATA


def test_no_socket(sock: socket.socket) -> None:
    source = unreader.SocketUnreader(sock)
    body = body_of(with_length(bodies.Body(bodies.LengthReader(source, len(DATA))), None))
    assert type(body) is PlainBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


def test_another_reader(sock: socket.socket) -> None:
    source = unreader.SocketUnreader(sock)
    body = body_of(with_length(bodies.Body(OtherReader(source, len(DATA))), sock))
    assert type(body) is PlainBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


@pytest.mark.parametrize("name", ["take_buffered", "unread"])
def test_another_unreader(sock: socket.socket, changed: pytest.MonkeyPatch, name: str) -> None:
    changed.delattr(unreader.Unreader, name)
    source = unreader.SocketUnreader(sock)
    body = body_of(with_length(bodies.Body(bodies.LengthReader(source, len(DATA))), sock))
    assert type(body) is PlainBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


def test_no_parser(chunked: socket.socket) -> None:
    source = unreader.SocketUnreader(chunked)
    body = body_of(with_chunks(bodies.Body(ChunkedReader(request(source), source)), chunked))
    assert type(body) is PlainBody
    assert read(body) == DATA
    assert rest_of(source) == b"HEAD "


def test_what_is_missing_is_named(changed: pytest.MonkeyPatch) -> None:
    changed.delattr(unreader.Unreader, "take_buffered")
    changed.delattr(bodies, "ChunkedReader")
    changed.setattr(bodies, "LengthReader", OtherReader)
    changed.delattr(wsgi.Response, "force_close")
    changed.delattr(wsgi, "base_environ")
    assert missing_internals() == (
        "gunicorn.http.wsgi.base_environ",
        "gunicorn.http.unreader.SocketUnreader.take_buffered",
        "gunicorn.http.body.LengthReader",
        "gunicorn.http.body.ChunkedReader",
        "gunicorn.http.wsgi.Response.force_close",
    )


@pytest.mark.parametrize("reader", [bodies.LengthReader, bodies.ChunkedReader])
def test_objects_that_are_made_differently(changed: pytest.MonkeyPatch, reader: type) -> None:
    changed.setattr(reader, "__init__", lambda self, one, two, three: None)
    assert missing_internals() == (f"gunicorn.http.body.{reader.__name__}",)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's and the server's end of a connection."""
    client, server = socket.socketpair()
    with client, server:
        yield client, server


def chunked_body(sock: socket.socket) -> tuple[RequestBody, Any]:
    source = unreader.SocketUnreader(sock)
    asked = SimpleNamespace(
        unreader=source, parse_headers=lambda data, from_trailer: [tuple(data.decode().split(": "))]
    )
    made = body_of(with_chunks(bodies.Body(bodies.ChunkedReader(asked, source)), sock))
    assert type(made) is ChunkedBody
    return made, source


def test_many_small_chunks_are_one_piece(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    client.sendall(b"1\r\nx\r\n" * 5_000 + b"0\r\nA: b\r\n\r\nHEAD ")
    body, source = chunked_body(server)
    assert bytes(body.receive(1_000_000)) == b"x" * 5_000
    assert body.receive(1_000_000) == b""
    assert body.ended
    assert body.trailer("a") == "b"
    assert rest_of(source) == b"HEAD "


def test_no_more_of_a_chunk_than_is_asked_for(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    client.sendall(b"a\r\n0123456789\r\n0\r\n\r\n")
    body, _ = chunked_body(server)
    assert [bytes(body.receive(4)) for _ in range(4)] == [b"0123", b"4567", b"89", b""]


@pytest.mark.parametrize(
    ("broken", "error"),
    [(b"", BodyIncomplete), (b"5\r\n01", BodyIncomplete), (b"x\r\n", BodyMalformed)],
)
def test_what_came_before_the_break_is_kept(
    ends: tuple[socket.socket, socket.socket], broken: bytes, error: type[Exception]
) -> None:
    client, server = ends
    client.sendall(b"3\r\nabc\r\n" + broken)
    client.shutdown(socket.SHUT_WR)
    body, _ = chunked_body(server)
    kept = b"abc" + broken[3:]
    received = b""
    while len(received) < len(kept):
        received += bytes(body.receive(100))
    assert received == kept
    with pytest.raises(error):
        body.receive(100)
    assert not body.ended


def test_a_body_that_breaks_off_is_logged_with_its_request_only(
    ends: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    client, server = ends
    client.sendall(b"012")
    client.close()
    source = unreader.SocketUnreader(server)
    body = body_of(with_length(bodies.Body(bodies.LengthReader(source, len(DATA))), server))
    assert bytes(body.receive(10)) == b"012"
    with caplog.at_level("INFO"), pytest.raises(BodyIncomplete):
        body.receive(10)
    assert not caplog.records


def test_trailers_that_are_too_long(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    body, _ = chunked_body(server)
    sender = Thread(target=client.sendall, args=[b"0\r\n" + b"A: b\r\n" * 30_000])
    sender.start()
    with pytest.raises(BodyMalformed, match="too long"):
        body.receive(100)
    server.close()
    sender.join()


def test_the_application_has_begun_to_read(chunked: socket.socket) -> None:
    source = unreader.SocketUnreader(chunked)
    reader = bodies.ChunkedReader(request(source), source)
    start = next(reader.parser)
    body = body_of(with_chunks(bodies.Body(reader), chunked))
    assert start + read(body) == DATA
    assert rest_of(source) == b"HEAD "


def test_the_application_reads_what_we_take_apart(chunked: socket.socket) -> None:
    source = unreader.SocketUnreader(chunked)
    body = bodies.Body(bodies.ChunkedReader(request(source), source))
    adopt_reader(body.reader)
    assert body.read() == DATA
    assert is_read(body)
    assert rest_of(source) == b"HEAD "
