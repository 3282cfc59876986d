"""A fast path for plain HTTP/1 requests and their responses.

A request is plain if it has an ordinary request line and a few well-formed fields, and its body
is framed by Content-Length alone. Everything else, malformed or just rare, is left to gunicorn's
parser, which gets the whole head from its first byte. Only heads that are too long are refused
here: gunicorn would look through all of it again for each piece that arrives.
"""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from typing import Any

from gunicorn.http.body import Body, LengthReader
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.http.parser import RequestParser
from gunicorn.http.wsgi import Response, base_environ
from gunicorn.util import is_hoppish, unquote_to_wsgi_str

from tuswsgi.transfer.body import DRAIN_LIMIT
from tuswsgi.transfer.fairness import RECEIVE, REQUEST, Budget
from tuswsgi.transfer.framing import BareLF, FieldBuffer, TooLong
from tuswsgi.transfer.gunicorn import is_read

#: Longer heads are not plain.
LONGEST_HEAD = 8000
_MOST_FIELDS = 60

# No absolute form, no "//", no fragment and no lower-case method. An upload server has no use
# for CONNECT and TRACE.
_REQUEST_LINE = re.compile(
    r"(GET|HEAD|POST|PATCH|PUT|DELETE|OPTIONS) (/(?!/)[!-\"$-~]*) HTTP/1\.([01])"
)
# Without control characters: a bare CR or LF might be taken for the end of a line.
_LINES = re.compile(rb"(?:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)+")
# RFC 9110, 5.6.2, without "_": an environ cannot tell it from "-".
_NAME = re.compile(r"[!#$%&'*+\-.^`|~0-9A-Za-z]+")

#: Fields that change how a message is read.
_NOT_PLAIN = {"TRANSFER_ENCODING", "TRAILER", "TE", "EXPECT", "UPGRADE", "HTTP2_SETTINGS"}

#: The environ's keys by the names of fields as clients spell them.
_keys: dict[str, str] = {}
_MOST_KEYS = 1000


class PlainRequest:
    """A request with the attributes that gunicorn's workers, responses and logs use."""

    trailers: tuple[()] = ()
    proxy_protocol_info: dict[str, Any] | None = None
    _expected_100_continue = False

    def __init__(
        self, method: str, uri: str, minor: int, fields: dict[str, str], parser: PlainParser
    ) -> None:
        self.method = method
        self.uri = uri
        self.path, _, self.query = uri.partition("?")
        self.fragment = ""
        self.version = (1, minor)
        self.fields = fields
        self.scheme = parser.scheme
        connection = fields.get("HTTP_CONNECTION", "").lower()
        self.must_close = connection == "close" or (minor == 0 and connection != "keep-alive")
        self.body = Body(LengthReader(parser.unreader, int(fields.get("CONTENT_LENGTH", 0))))

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The fields as gunicorn has them."""
        return [
            (key.removeprefix("HTTP_").replace("_", "-"), value)
            for key, value in self.fields.items()
        ]

    def force_close(self) -> None:
        self.must_close = True

    def should_close(self) -> bool:
        return self.must_close


class PlainParser(RequestParser):  # type: ignore[misc]  # gunicorn has no types
    """Parses plain requests itself and leaves others to gunicorn's parser.

    Each body must be read to its end before the next request is asked for.

    :param longest_head: the most bytes of a head.
    """

    mesg: Any

    def __init__(self, cfg: Any, sock: Any, addr: Any, longest_head: int) -> None:
        super().__init__(cfg, sock, addr)
        self.scheme = "https" if cfg.is_ssl else "http"
        self.budget = Budget()
        self._longest_head = longest_head

    def __next__(self) -> Any:
        if self.mesg is not None and (self.mesg.should_close() or not is_read(self.mesg.body)):
            raise StopIteration
        # A client that sends many requests at once must not keep others from being served.
        self.budget.share()
        self.budget.spend(REQUEST)
        head, rest = self._read_head()
        request = plain_request(head, self) if head else None
        # gunicorn's parser would read the body of the last request again.
        self.mesg = request
        if request is None:
            self.unreader.unread(head + rest)
            return super().__next__()
        self.req_count += 1
        if rest:
            self.unreader.unread(rest)
        return request

    def _read_head(self) -> tuple[bytes, bytes]:
        """Return the next head with its empty line, and what was read beyond it.

        The head is empty if it is malformed, or if the connection is closed before its end.

        :raises LimitRequestHeaders: if it is too long.
        :raises LimitRequestLine: if its first line is.
        """
        data = self.unreader.take_buffered() or self._receive()
        end = data.find(b"\r\n\r\n")
        if end < 0:
            data, end = self._read_on(data)
        elif end > self._longest_head:
            raise self._too_long(data[:end])
        return (b"", data) if end < 0 else (data[: end + 4], data[end + 4 :])

    def _read_on(self, more: bytes) -> tuple[bytes, int]:
        """Receive the rest of a head and return it, with the position of its empty line or -1."""
        buffer = FieldBuffer(self._longest_head)
        end = -1
        try:
            while more and end < 0:
                end = buffer.add(more)
                self.budget.spend(len(more) + RECEIVE)
                if end < 0:
                    self._check_request_line(buffer.data)
                    self.budget.share()
                    more = self._receive()
        except BareLF:
            pass  # gunicorn refuses it
        except TooLong as error:
            raise self._too_long(bytes(buffer.data)) from error
        return bytes(buffer.data), end

    def _receive(self) -> bytes:
        data: bytes = self.unreader.sock.recv(self.unreader.mxchunk)
        return data

    def _check_request_line(self, data: bytearray) -> None:
        # An empty line may precede it.
        limit = self.cfg.limit_request_line + 4
        if len(data) > limit > 4 and data.find(b"\r\n", 2, limit) < 0:
            raise LimitRequestLine(len(data), self.cfg.limit_request_line)

    def _too_long(self, head: bytes) -> Exception:
        error: Exception = LimitRequestHeaders(f"limit request head size ({self._longest_head})")
        if b"\r\n" not in head[2:]:
            error = LimitRequestLine(len(head), self._longest_head)
        return error


def plain_request(head: bytes, parser: PlainParser) -> PlainRequest | None:
    """Return the request of a head, ``None`` if it is not plain."""
    if len(head) > LONGEST_HEAD or _LINES.fullmatch(head) is None:
        return None
    request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
    first = _REQUEST_LINE.fullmatch(request_line)
    if first is None or len(lines) >= _MOST_FIELDS:
        return None
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        key = _keys.get(name) or _key(name)
        if key is None or not colon or key in fields:
            return None
        fields[key] = value.strip(" \t")
    if not _is_plain_framing(fields):
        return None
    return PlainRequest(first[1], first[2], int(first[3]), fields, parser)


def _is_plain_framing(fields: dict[str, str]) -> bool:
    length = fields.get("CONTENT_LENGTH", "0")
    connection = fields.get("HTTP_CONNECTION")
    return (
        length.isascii()
        and length.isdecimal()
        and len(length) < 19
        and (connection is None or connection.lower() in ("keep-alive", "close"))
    )


def _key(name: str) -> str | None:
    """Return the environ's key for a field, ``None`` if the field is not plain."""
    if _NAME.fullmatch(name) is None:
        return None
    key = name.upper().replace("-", "_")
    if key in _NOT_PLAIN:
        return None
    if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        key = f"HTTP_{key}"
    if len(_keys) < _MOST_KEYS:
        _keys[name] = key
    return key


class PlainEnviron:
    """Makes the WSGI environs (PEP 3333) of the plain requests of a connection."""

    def __init__(self, cfg: Any, sock: Any, addr: Any, server: Any) -> None:
        self._common = {
            **base_environ(cfg),
            "wsgi.multithread": True,
            "wsgi.url_scheme": "https" if cfg.is_ssl else "http",
            "gunicorn.socket": sock,
            "SCRIPT_NAME": "",
        }
        if isinstance(addr, tuple):
            self._common |= {"REMOTE_ADDR": addr[0], "REMOTE_PORT": str(addr[1])}
        else:
            self._common["REMOTE_ADDR"] = addr.decode() if isinstance(addr, bytes) else addr
        self._is_unix = not isinstance(server, tuple)
        if not self._is_unix:
            self._common |= {"SERVER_NAME": server[0], "SERVER_PORT": str(server[1])}

    def of(self, request: PlainRequest) -> dict[str, Any]:
        """Return the environ of a request."""
        path = request.path
        environ = {
            **self._common,
            **request.fields,
            "wsgi.input": request.body,
            "REQUEST_METHOD": request.method,
            "QUERY_STRING": request.query,
            "RAW_URI": request.uri,
            "PATH_INFO": unquote_to_wsgi_str(path) if "%" in path else path,
            "SERVER_PROTOCOL": "HTTP/1.1" if request.version == (1, 1) else "HTTP/1.0",
        }
        if self._is_unix:
            # As in gunicorn: a unix socket has no name, so the client's Host is used.
            name, _, port = request.fields.get("HTTP_HOST", "").partition(":")
            environ["SERVER_NAME"] = name
            environ["SERVER_PORT"] = port or self._default_port(name)
        return environ

    def _default_port(self, name: str) -> str:
        if not name:
            return ""
        return "443" if self._common["wsgi.url_scheme"] == "https" else "80"


# What could end a line, and what Latin-1 does not have.
_NO_VALUE = re.compile(r"[^\t -~\x80-\xff]")
_NO_NAME = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]|^$")

#: The lower-case names of a response's fields by the names as applications spell them.
_names: dict[str, str] = {}


class PlainResponse(Response):  # type: ignore[misc]
    """Sends the head together with the first block of the body.

    Unusual headers are left to gunicorn's response.
    """

    headers_sent: bool

    def __init__(self, req: PlainRequest, sock: Any, cfg: Any) -> None:
        super().__init__(req, sock, cfg)
        self._head: bytes | None = None

    def process_headers(self, headers: list[tuple[str, str]]) -> None:
        names = [_names.get(name) or _plain_name(name) for name, _ in headers]
        lengths = names.count("content-length")
        if (
            None in names
            or lengths > 1
            or (lengths and self.status_code == 204)
            # Joined and not formatted, so that a value that is not a string is noticed.
            or _NO_VALUE.search("".join([value for _, value in headers])) is not None
        ):
            super().process_headers(headers)
            return
        self.headers = headers
        if lengths:
            self.response_length = int(headers[names.index("content-length")][1])
        head = "".join([f"{name}: {value}\r\n" for name, value in headers])
        self._head = head.encode("latin-1")

    def is_chunked(self) -> bool:
        # gunicorn's method looks at its settings first, which is slow.
        return self.response_length is None and self.req.version > (1, 0) and not self._omits_body

    def send_headers(self) -> None:
        self._send(b"")

    def write(self, arg: bytes) -> None:
        if self._head is None or self.headers_sent or self.chunked or not isinstance(arg, bytes):
            super().write(arg)
        elif self._omits_body or self.response_length != len(arg):
            self._send(b"")
            super().write(arg)
        else:
            self.sent = len(arg)
            self._send(arg)

    def _send(self, body: bytes) -> None:
        if self.headers_sent:
            return
        if self._head is None:
            super().send_headers()
            return
        self.headers_sent = True
        if self.req.body.reader.length > DRAIN_LIMIT:
            self.force_close()  # the rest is too long to be read
        minor = self.req.version[1]
        connection = "close" if self.should_close() else "keep-alive"
        chunked = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        start = (
            f"HTTP/1.{minor} {self.status}\r\nServer: {self.version}\r\nDate: {_date()}\r\n"
            f"Connection: {connection}\r\n{chunked}"
        )
        data = start.encode("latin-1") + self._head + b"\r\n" + body
        sent = self.sock.send(data)
        if sent < len(data):
            self.sock.sendall(data[sent:])


def _plain_name(name: str) -> str | None:
    """Return a field's name in lower case, ``None`` if the field is not plain."""
    lower = name.lower()
    if is_hoppish(lower) or _NO_NAME.search(name) is not None:
        return None
    if len(_names) < _MOST_KEYS:
        _names[name] = lower
    return lower


_now = (0, "")


def _date() -> str:
    """Return the value of the Date field, cached for a second."""
    global _now
    seconds = int(time.time())
    if _now[0] != seconds:
        _now = (seconds, formatdate(seconds, usegmt=True))
    return _now[1]
