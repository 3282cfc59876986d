"""A small HTTP and tus client on raw sockets.

It can do what a well-behaved client never does: break off anywhere, fall silent, send two
requests at once, read an answer while it still sends. It owns no expectations; tests do.
"""

from __future__ import annotations

import hashlib
import random
import select
import socket
import ssl
import struct
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MB = 1000 * 1000

#: Seconds after which a test gives up waiting: more than a busy machine ever needs.
PATIENCE = 60.0

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {**TUS, "Content-Type": "application/offset+octet-stream"}


@dataclass(frozen=True)
class Origin:
    """Where a server is.

    :param address: host and port, or the path of a unix socket.
    :param tls: how to check the server's certificate; ``None`` for plain http.
    """

    address: tuple[str, int] | str
    tls: ssl.SSLContext | None = None

    @property
    def host(self) -> str:
        """The value of ``Host``."""
        if isinstance(self.address, str):
            return "localhost"
        name, port = self.address
        return f"{name}:{port}"

    def connect(self) -> socket.socket:
        family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
        sock = socket.socket(family)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(self.address)
            if self.tls is not None:
                return self.tls.wrap_socket(sock, server_hostname="127.0.0.1")
        except BaseException:
            sock.close()
            raise
        return sock


@dataclass(frozen=True)
class Response:
    """One answer.

    :param headers: by their names in lower case.
    :param interim: the 1xx statuses that came before it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    interim: tuple[int, ...] = ()

    @property
    def offset(self) -> int:
        return int(self.headers["upload-offset"])

    @property
    def closes(self) -> bool:
        """Whether the server says that it closes the connection."""
        return self.headers.get("connection", "").lower() == "close"


class Connection:
    """One connection to a server."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.sock = origin.connect()
        self._buffer = b""
        self._methods: deque[str] = deque()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_head(
        self, method: str, path: str, headers: Mapping[str, str | int], *, version: str = "1.1"
    ) -> None:
        self.send(self.head(method, path, headers, version=version))

    def head(
        self, method: str, path: str, headers: Mapping[str, str | int], *, version: str = "1.1"
    ) -> bytes:
        """Return the head of a request, whose answer is going to be read."""
        self._methods.append(method)
        lines = [f"{method} {path} HTTP/{version}"]
        if "Host" not in headers:
            lines.append(f"Host: {self.origin.host}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def request(
        self, method: str, path: str, headers: Mapping[str, str | int], body: bytes = b""
    ) -> Response:
        if body:
            headers = {**headers, "Content-Length": len(body)}
        self.send(self.head(method, path, headers) + body)
        return self.read()

    def send_until_answered(self, block: bytes) -> Response:
        """Send `block` again and again, without a pause, until there is an answer."""
        while not select.select([self.sock], [], [], 0)[0]:
            self.send(block)
        return self.read()

    def pause(self, seconds: float) -> None:
        """Send nothing for a while, and see that the server says nothing either."""
        assert select.select([self.sock], [], [], seconds)[0] == [], "an answer came too early"

    def read(self) -> Response:
        """Read the answer to the oldest request that has none yet."""
        method = self._methods.popleft() if self._methods else "GET"
        interim = []
        while True:
            status, headers = self._read_head()
            if status >= 200:
                break
            interim.append(status)
        body = self._read_body(method, status, headers)
        return Response(status, headers, body, tuple(interim))

    def read_interim(self) -> int:
        """Read the head of a 1xx answer."""
        status, _ = self._read_head()
        return status

    def wait_for_bytes(self) -> None:
        """Wait for the beginning of an answer."""
        assert select.select([self.sock], [], [], PATIENCE)[0], "no answer"

    def read_rest(self) -> bytes:
        """Read until the server closes the connection."""
        while self._fill():
            pass
        rest, self._buffer = self._buffer, b""
        return rest

    def count_body(self) -> int:
        """Read the answer to a GET and count the bytes of its body."""
        status, headers = self._read_head()
        assert status == 200
        length, seen = int(headers["content-length"]), len(self._buffer)
        while seen < length and (received := len(self.sock.recv(MB))):
            seen += received
        return seen

    def is_closed(self) -> bool:
        """Wait until the server closes; it must not send anything before."""
        try:
            return self.read_rest() == b""
        except ConnectionResetError:
            return True

    def _read_head(self) -> tuple[int, dict[str, str]]:
        while b"\r\n\r\n" not in self._buffer:
            if not self._fill():
                raise ConnectionError(f"closed in the head of an answer: {self._buffer!r}")
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        protocol, status, _ = line.split(" ", 2)
        assert protocol in ("HTTP/1.1", "HTTP/1.0"), line
        pairs = (line.partition(":") for line in lines)
        return int(status), {name.lower(): value.strip() for name, _, value in pairs}

    def _read_body(self, method: str, status: int, headers: Mapping[str, str]) -> bytes:
        if method == "HEAD" or status in (204, 304):
            return b""
        if "chunked" in headers.get("transfer-encoding", ""):
            return self._read_chunks()
        if "content-length" in headers:
            return self._take(int(headers["content-length"]))
        return self.read_rest()

    def _read_chunks(self) -> bytes:
        body = b""
        while True:
            while b"\r\n" not in self._buffer:
                assert self._fill(), "closed in a chunk"
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            piece = self._take(int(line, 16) + 2)
            if len(piece) == 2:
                return body
            body += piece[:-2]

    def _take(self, n: int) -> bytes:
        pieces, missing = [self._buffer], n - len(self._buffer)
        while missing > 0:
            piece = self.sock.recv(min(missing, 1024 * 1024))
            if not piece:
                raise ConnectionError(f"closed {missing} bytes before the end of a body")
            pieces.append(piece)
            missing -= len(piece)
        whole = b"".join(pieces)
        self._buffer = whole[n:]
        return whole[:n]

    def _fill(self) -> bool:
        received = self.sock.recv(65536)
        self._buffer += received
        return bool(received)

    def close(self) -> None:
        """Close both directions at once (a FIN, and an RST if something was unread)."""
        self.sock.close()

    def reset(self) -> None:
        """Break off with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def half_close(self) -> None:
        """Say that nothing more is sent, and go on reading."""
        self.sock.shutdown(socket.SHUT_WR)


class Client:
    """A tus client that opens a connection for each request."""

    def __init__(self, origin: Origin, url: str = "/files/") -> None:
        self.origin = origin
        self.url = url

    def connect(self) -> Connection:
        return Connection(self.origin)

    def request(
        self, method: str, path: str, headers: Mapping[str, str | int], body: bytes = b""
    ) -> Response:
        with self.connect() as connection:
            return connection.request(method, path, {**headers, "Connection": "close"}, body)

    def create(self, size: int | None, **headers: str) -> str:
        """Create an upload and return its path."""
        length = {"Upload-Length": size} if size is not None else {"Upload-Defer-Length": 1}
        response = self.request("POST", self.url, {**TUS, **length, **_wire(headers)})
        assert response.status == 201, response
        return path_of(response)

    def create_final(self, parts: Sequence[str]) -> str:
        """Create a final upload of partial ones and return its path."""
        concat = "final;" + " ".join(parts)
        response = self.request("POST", self.url, {**TUS, "Upload-Concat": concat})
        assert response.status == 201, response
        return path_of(response)

    def head(self, path: str) -> Response:
        return self.request("HEAD", path, TUS)

    def offset(self, path: str) -> int:
        response = self.head(path)
        assert response.status == 200, response
        return response.offset

    def patch(self, path: str, offset: int, data: bytes, **headers: str) -> Response:
        return self.request("PATCH", path, patch_headers(offset, None, **headers), data)

    def finish(self, path: str, content: bytes) -> None:
        """Resume an upload from the server's offset and send all that is missing."""
        offset = self.offset(path)
        response = self.patch(path, offset, content[offset:])
        assert (response.status, response.offset) == (204, len(content)), response

    def get(self, path: str, **headers: str) -> Response:
        return self.request("GET", path, _wire(headers))

    def start_patch(
        self, path: str, offset: int, length: int | None, first: bytes = b"", **headers: str
    ) -> Connection:
        """Send the head of a PATCH.

        :param length: of its body; ``None`` for a chunked one.
        :param first: bytes of its body, in one piece with the head. The server takes its time
            with few bytes that come after it began to wait.
        """
        connection = self.connect()
        body = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": length}
        head = connection.head("PATCH", path, {**patch_headers(offset, None, **headers), **body})
        connection.send(head + (chunk(first) if length is None and first else first))
        return connection


def patch_headers(offset: int, length: int | None = None, **headers: str) -> dict[str, str | int]:
    own: dict[str, str | int] = {**BYTES, "Upload-Offset": offset, **_wire(headers)}
    return own if length is None else {**own, "Content-Length": length}


def path_of(response: Response) -> str:
    """Return the path in ``Location``."""
    return urlsplit(response.headers["location"]).path


def chunk(data: bytes) -> bytes:
    """Encode one chunk of a chunked body; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def content(size: int, seed: int = 1) -> bytes:
    """Return bytes of which no two blocks are alike."""
    numbers, piece = random.Random(seed), 64 * MB
    return b"".join(numbers.randbytes(min(piece, size - at)) for at in range(0, size, piece))


def sha1(data: bytes) -> str:
    """Return the value of ``Upload-Checksum``."""
    return "sha1 " + b64encode(hashlib.sha1(data).digest()).decode()


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(MB):
            digest.update(block)
    return digest.hexdigest()


def wait_until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for something that only looking again and again can tell."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def _wire(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
