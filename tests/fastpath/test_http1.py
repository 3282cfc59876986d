"""Plain requests and responses: what is taken is what gunicorn would have made of it."""

from __future__ import annotations

from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import (
    InvalidHeader,
    InvalidRequestLine,
    LimitRequestHeaders,
    LimitRequestLine,
)
from gunicorn.http.parser import RequestParser
from gunicorn.http.wsgi import Response, create
from hypothesis import given, settings
from hypothesis import strategies as st

from tuswsgi.serving.http1 import PlainEnviron, PlainParser, PlainRequest, PlainResponse

PEER, SERVER = ("192.0.2.7", 40000), ("192.0.2.1", 1081)
LIMIT = 128 * 1024


class Socket:
    """A socket on which bytes arrive in pieces, and that keeps what is sent."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.sent = b""

    def recv(self, n: int) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def send(self, data: bytes) -> int:
        half = data[: len(data) // 2 + 1]  # a socket may take less
        self.sent += half
        return len(half)


@pytest.fixture(scope="module")
def cfg() -> Config:
    cfg = Config()
    for name in ("secure_scheme_headers", "forwarder_headers", "forwarded_allow_ips"):
        cfg.set(name, {} if name == "secure_scheme_headers" else "")
    return cfg


def parser_of(cfg: Config, *pieces: bytes) -> PlainParser:
    return PlainParser(cfg, Socket(*pieces), PEER, LIMIT)


def head(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def parsed(cfg: Config, data: bytes) -> Any:
    """Return what our parser makes of a head: a request, or the exception."""
    return outcome(parser_of(cfg, data))


def outcome(parser: RequestParser) -> Any:
    try:
        return next(parser)
    except Exception as error:
        return error


def environs(cfg: Config, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our environ of a plain request, and gunicorn's."""
    sock = Socket(data)
    request = next(PlainParser(cfg, sock, PEER, LIMIT))
    ours = PlainEnviron(cfg, sock, PEER, SERVER).of(request)
    sock = Socket(data)
    request = next(RequestParser(cfg, sock, PEER))
    _, theirs = create(request, sock, PEER, SERVER, cfg)
    for environ in (ours, theirs):
        for name in ("wsgi.input", "wsgi.errors", "gunicorn.socket", "wsgi.early_hints"):
            environ.pop(name, None)
        environ["wsgi.multithread"] = True
    return ours, theirs


PLAIN = [
    head("HEAD /files/abc HTTP/1.1", "Host: x", "Tus-Resumable: 1.0.0"),
    head("POST /files?a=b&c HTTP/1.1", "host:x:80", "CONTENT-LENGTH: 12", "Content-type: a/b"),
    head("PATCH /files/%41%2F%C3%A9?%3f HTTP/1.1", "Host: x", "X-Empty:", "X-Tab: \ta\tb \t"),
    head("GET /a/../b;c=d HTTP/1.0", "Connection: Keep-Alive", "X-Latin: \xe9\xff"),
    head("OPTIONS / HTTP/1.1", "Host: x", "connection: CLOSE"),
    head("DELETE /x HTTP/1.1", "Host: [::1]:8080", "Cookie: a=b; c=d", "Forwarded: for=x"),
]

NOT_PLAIN = [
    head("get /x HTTP/1.1", "Host: x"),
    head("GET //x HTTP/1.1", "Host: x"),
    head("GET http://x/y HTTP/1.1", "Host: x"),
    head("OPTIONS * HTTP/1.1", "Host: x"),
    head("GET /x#y HTTP/1.1", "Host: x"),
    head("GET /x HTTP/1.2", "Host: x"),
    head("GET  /x HTTP/1.1", "Host: x"),
    head("GET /\xe9 HTTP/1.1", "Host: x"),
    head("GET /x HTTP/1.1", "Host: x", "Host: y"),
    head("GET /x HTTP/1.1", "Host : x"),
    head("GET /x HTTP/1.1", "Host: x", " folded"),
    head("GET /x HTTP/1.1", "Host: x", "X_Y: z"),
    head("GET /x HTTP/1.1", "Host: x", "X: a\x00b"),
    head("GET /x HTTP/1.1", "Host: x", "X: a\rb"),
    head("GET /x HTTP/1.1", "Host: x", "X: a\nY: b"),
    head("GET /x HTTP/1.1", "Host: x", "no colon"),
    head("GET /x HTTP/1.1", "Host: x", ": nameless"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: -1"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: \xb2"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: 1, 1"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: 1", "content-length: 1"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: 1", "Transfer-Encoding: chunked"),
    head("POST /x HTTP/1.1", "Host: x", "Transfer-Encoding: chunked"),
    head("POST /x HTTP/1.1", "Host: x", "Content-Length: 1", "Expect: 100-continue"),
    head("GET /x HTTP/1.1", "Host: x", "Connection: upgrade", "Upgrade: websocket"),
    head("GET /x HTTP/1.1", "Host: x", "Connection: keep-alive, x"),
    head("GET /x HTTP/1.1", *(f"X-{n}: y" for n in range(70))),
    head("GET /x HTTP/1.1", f"X: {'y' * 9000}"),
    b"GET /x HTTP/1.1\nHost: x\n\n",
    b"\r\nGET /x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /x HTTP/1.1\r\nHost: x\r\n",
    b"",
]


@pytest.mark.parametrize("data", PLAIN)
def test_plain_requests(cfg: Config, data: bytes) -> None:
    assert type(parsed(cfg, data)) is PlainRequest
    ours, theirs = environs(cfg, data)
    assert ours == theirs


@pytest.mark.parametrize("data", PLAIN)
def test_what_gunicorn_asks_a_request(cfg: Config, data: bytes) -> None:
    ours, theirs = parsed(cfg, data), next(RequestParser(cfg, Socket(data), PEER))
    for name in ("method", "uri", "path", "query", "fragment", "version", "scheme", "headers"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.should_close() == theirs.should_close()
    assert ours.body.reader.length == theirs.body.reader.length


@pytest.mark.parametrize("data", NOT_PLAIN)
def test_the_others_are_gunicorns(cfg: Config, data: bytes) -> None:
    ours, theirs = parsed(cfg, data), outcome(RequestParser(cfg, Socket(data), PEER))
    assert type(ours) is type(theirs) is not PlainRequest
    assert getattr(ours, "headers", str(ours)) == getattr(theirs, "headers", str(theirs))


NAMES = st.text("abcXYZ-_!09 :", min_size=1, max_size=6) | st.sampled_from(
    ["Host", "Content-Length", "content-length", "Transfer-Encoding", "Connection", "Expect"]
)
VALUES = st.text(st.characters(max_codepoint=255), max_size=6) | st.sampled_from(
    ["0", "5", "chunked", "close", "keep-alive", "100-continue", "x"]
)
TARGETS = st.text("/ab?%2F#;é ", min_size=1, max_size=8).map(lambda text: f"/{text}")


@settings(deadline=None)
@given(TARGETS, st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_any_head(target: str, fields: list[tuple[str, str]]) -> None:
    cfg = Config()
    cfg.set("secure_scheme_headers", {})
    cfg.set("forwarder_headers", "")
    lines = [f"{name}: {value}" for name, value in fields]
    data = head(f"PATCH {target} HTTP/1.1", *lines)
    if type(parsed(cfg, data)) is PlainRequest:
        ours, theirs = environs(cfg, data)
        assert ours == theirs


def test_a_head_in_pieces_and_one_after_another(cfg: Config) -> None:
    data = PLAIN[0] + PLAIN[1] + b"body of 12 b" + PLAIN[2]
    for cut in range(len(data)):
        parser = parser_of(cfg, data[:cut], data[cut:])
        first, second = next(parser), next(parser)
        assert (first.path, second.path) == ("/files/abc", "/files")
        assert second.body.read() == b"body of 12 b"
        assert next(parser).query == "%3f"
        with pytest.raises(StopIteration):
            next(parser)


def test_an_unread_body_is_not_a_request(cfg: Config) -> None:
    data = head("POST /a HTTP/1.1", "Host: x", "Content-Length: 19") + b"GET /b HTTP/1.1\r\n\r\n"
    parser = parser_of(cfg, data + PLAIN[0])
    next(parser)
    with pytest.raises(StopIteration):
        next(parser)
    parser = parser_of(cfg, data + PLAIN[0])
    next(parser).body.read()
    assert next(parser).path == "/files/abc"


def test_gunicorns_requests_in_between(cfg: Config) -> None:
    chunked = NOT_PLAIN[22] + b"3\r\nabc\r\n0\r\n\r\n"
    parser = parser_of(cfg, PLAIN[0] + chunked + PLAIN[1])
    assert next(parser).path == "/files/abc"
    request = next(parser)
    assert (request.path, request.body.read()) == ("/x", b"abc")
    assert next(parser).path == "/files"


FILLED = head("GET /x HTTP/1.1", "Host: x", *(f"X-{n}: {'y' * 5000}" for n in range(20)))


@pytest.mark.parametrize("piece", [1, 3, 1000, 8192])
def test_a_large_head_in_pieces(cfg: Config, piece: int) -> None:
    pieces = [FILLED[start : start + piece] for start in range(0, len(FILLED), piece)]
    parser = parser_of(cfg, *pieces, PLAIN[0])
    request = next(parser)
    assert (request.path, len(request.headers)) == ("/x", 21)
    assert next(parser).path == "/files/abc"


@pytest.mark.parametrize("piece", [1000, 8192, 10**6])
@pytest.mark.parametrize("ends", [False, True])
def test_a_head_has_a_limit(cfg: Config, piece: int, ends: bool) -> None:
    lines = [f"X-{n}: {'y' * 1300}" for n in range(97)]
    data = head("GET /x HTTP/1.1", "Host: x", *lines)[:-4]
    data += b"y" * (LIMIT - len(data))

    def outcome_of(data: bytes) -> Any:
        data += b"\r\n\r\n" * ends
        pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
        return outcome(parser_of(cfg, *pieces, *([b"z" * 10] * 100)))

    assert isinstance(outcome_of(data + b"y"), LimitRequestHeaders)
    assert isinstance(outcome_of(data * 3), LimitRequestHeaders)
    if ends:
        assert outcome_of(data).path == "/x"


@pytest.mark.parametrize("start", [b"", b"\r\n"])
def test_a_first_line_has_its_own_limit(cfg: Config, start: bytes) -> None:
    data = start + b"GET /".ljust(8190, b"x")
    parser = parser_of(cfg, data, PLAIN[0])
    assert isinstance(outcome(parser), LimitRequestLine)
    assert isinstance(outcome(RequestParser(cfg, Socket(data, PLAIN[0]), PEER)), LimitRequestLine)
    assert parser.unreader.sock.pieces == [PLAIN[0]]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /x HTTP/1.1\nHost: x\n\n",
        b"GET /x HTTP/1.1\r\nHost: x\n\n",
        b"GET /x HTTP/1.1\r\nHost: x\n\r\n",
        b"\nGET /x HTTP/1.1\r\nHost: x\r\n",
    ],
)
def test_bare_line_feeds_are_refused_at_once(cfg: Config, data: bytes) -> None:
    for cut in range(len(data)):
        parser = parser_of(cfg, data[:cut], data[cut:], b"more") if cut else parser_of(cfg, data)
        assert isinstance(outcome(parser), (InvalidRequestLine, InvalidHeader))


def test_a_line_feed_in_a_body_is_none_in_the_head(cfg: Config) -> None:
    parser = parser_of(cfg, PLAIN[1][:20], PLAIN[1][20:] + b"body of\n\n12")
    assert next(parser).path == "/files"


def sent(kind: type, cfg: Config, data: bytes, status: str, headers: Any, *blocks: bytes) -> Any:
    """Return what a response puts on the wire but for its date, or the exception."""
    sock = Socket(data)
    response = kind(next(PlainParser(cfg, sock, PEER, LIMIT)), sock, cfg)
    try:
        response.start_response(status, headers)
        for block in blocks:
            response.write(block)
        response.close()
    except Exception as error:
        return type(error)
    lines = sock.sent.split(b"\r\n")
    return [line for line in lines if not line.startswith(b"Date: ")], response.should_close()


@pytest.mark.parametrize("request_head", [PLAIN[0], PLAIN[3], PLAIN[4]])
@pytest.mark.parametrize(
    ("status", "headers", "blocks"),
    [
        ("204 No Content", [("Upload-Offset", "5")], [b""]),
        ("204 No Content", [("Content-Length", "0")], [b""]),
        ("304 Not Modified", [("ETag", '"x"'), ("Content-Length", "7")], []),
        ("200 OK", [("Content-Length", "5"), ("X", "\xe9")], [b"hello"]),
        ("200 OK", [("content-length", "5")], [b"he", b"llo"]),
        ("200 OK", [("Content-Length", "5")], [b"hello and more"]),
        ("200 OK", [("Content-Length", "5")], []),
        ("200 OK", [], [b"he", b"", b"llo"]),
        ("201 Created", [("Location", "/x"), ("Connection", "close")], [b""]),
        ("200 OK", [("Transfer-Encoding", "chunked"), ("Content-Length", "0")], [b""]),
        ("200 OK", [("X", "a\r\nSet-Cookie: b")], [b""]),
        ("200 OK", [("X\r\nY", "a")], [b""]),
        ("200 OK", [("X", "\N{SNOWMAN}")], [b""]),
        ("200 OK", [("X", 5)], [b""]),
        ("460 Checksum Mismatch", [("Content-Length", "1")], [b"x"]),
    ],
)
def test_responses(
    cfg: Config, request_head: bytes, status: str, headers: Any, blocks: list[bytes]
) -> None:
    ours, theirs = (
        sent(kind, cfg, request_head, status, list(headers), *blocks)
        for kind in (PlainResponse, Response)
    )
    assert ours == theirs
