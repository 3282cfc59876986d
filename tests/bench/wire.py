"""HTTP as far as the load generator needs it: where a server is, requests and answers.

Requests are bytes that are built once. This file owns sockets' timeouts and the framing of
answers, and the two ways in which a server can fail to do what it was asked for.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

#: How many seconds a socket may stay silent.
PATIENCE = 60.0

_TYPE = {"Content-Type": "application/offset+octet-stream"}
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Failed(Exception):
    """A server did not do what was asked for."""


class Unsupported(Failed):
    """A server cannot do what is asked for, and says so."""


class Answer(NamedTuple):
    """The status and the head of an answer."""

    status: int
    head: bytes

    def header(self, name: str) -> str:
        """Return a header's value, or an empty string."""
        found = re.search(rf"\r\n{name}: *([^\r]*)".encode(), self.head, re.IGNORECASE)
        return found[1].decode("latin-1") if found else ""


@dataclass(frozen=True)
class Target:
    """Where a server creates uploads."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Return the target that a URL names."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not a URL of http or https.")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname, port, parts.path or "/")

    def connect(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.create_connection((self.host, self.port), PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.scheme == "http":
            return connection
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(connection, server_hostname=self.host)

    def request(self, method: str, path: str = "", /, **headers: object) -> bytes:
        """Return the head of a request; underscores in names of headers stand for dashes."""
        lines = [f"{method} {path or self.path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines.append("Tus-Resumable: 1.0.0")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def ask(self, request: bytes, *statuses: int) -> Answer:
        """Send one request on a connection of its own and return the answer."""
        with self.connect() as connection:
            return ask(connection, request, *statuses)

    def patch(self, path: str, length: int, **headers: object) -> bytes:
        """Return the head of a request that appends ``length`` bytes to an empty upload."""
        headers = {"Upload-Offset": 0, "Content-Length": length, **_TYPE, **headers}
        return self.request("PATCH", path, **headers)

    def post(self, body: bytes, **headers: object) -> bytes:
        """Return a request that creates an upload with all of its content."""
        size = len(body)
        head = self.request("POST", Upload_Length=size, Content_Length=size, **_TYPE, **headers)
        return head + body


def ask(connection: socket.socket, request: bytes, *statuses: int) -> Answer:
    """Send a request and return the answer, which must have one of the statuses."""
    connection.sendall(request)
    return expect(whole(connection, request), *statuses)


def whole(connection: socket.socket, request: bytes) -> bytes:
    """Return the answer to a request that was sent."""
    answer = receive(connection)
    while not is_whole(answer, request):
        answer += receive(connection)
    return answer


def receive(connection: socket.socket) -> bytes:
    """Return what has arrived; nothing only if the connection does not block."""
    try:
        received = connection.recv(64 * 1024)
    except BlockingIOError:
        return b""
    except ConnectionError as error:
        raise Failed("The connection was reset.") from error
    if not received:
        raise Failed("The connection was closed before the answer was whole.")
    return received


def is_whole(answer: bytes, request: bytes) -> bool:
    """Tell whether all of the answer to a request is there."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    if request.startswith(b"HEAD ") or head[9:12] == b"204":
        return True
    length = _LENGTH.search(head)
    # Without a length it is chunked.
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def expect(answer: bytes, *statuses: int) -> Answer:
    """Return an answer, which must have one of the statuses."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head[9:12])
    if status not in statuses:
        said = b": ".join(filter(None, (head.splitlines()[0][9:], body[:100].strip())))
        raise Failed(f"The answer was {said.decode('latin-1')}.")
    return Answer(status, head)
