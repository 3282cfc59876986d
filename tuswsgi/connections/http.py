"""An HTTP client on top of ``requests`` whose timeout bounds the whole response.

The timeouts of ``requests`` bound each wait for bytes. A server that sends a byte now and then
could hold a client's request for ever.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from http.client import HTTPResponse
from http.cookiejar import DefaultCookiePolicy
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3 import HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Timeout

#: How many idle connections are kept for each server.
_IDLE_CONNECTIONS = 256

_CHUNK = 8192


@dataclass(frozen=True)
class HttpAnswer:
    """A response.

    :param headers: a mapping that ignores the case of names.
    :param body: the body, or the beginning of it.
    :param complete: whether ``body`` is all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool

    @property
    def content_type(self) -> str | None:
        return self.headers.get("Content-Type")


class HttpClient:
    """Sends requests, for all greenlets or threads of a process.

    It keeps connections alive, stores no cookies and follows no redirects. From the environment
    it takes proxies (``HTTPS_PROXY``, ``NO_PROXY``, ...) and certificate authorities
    (``REQUESTS_CA_BUNDLE``), but not ``.netrc``, which would replace the credentials of requests.

    :param timeout: for a request and its response together, in seconds. It does not bound name
        resolution, which has the resolver's timeout.
    :param max_answer: the longest body to read, in bytes.
    """

    def __init__(self, timeout: float, max_answer: int) -> None:
        self.timeout = timeout
        self.max_answer = max_answer
        self._session = session = requests.Session()
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers.clear()
        # No compression: `max_answer` bounds the bytes that are received.
        session.headers.update({"User-Agent": "tuswsgi", "Accept-Encoding": "identity"})
        for scheme in ("http://", "https://"):
            session.mount(scheme, _BoundedAdapter(pool_maxsize=_IDLE_CONNECTIONS))

    def post(
        self, url: str, body: bytes, headers: Mapping[str, str], timeout: float | None = None
    ) -> HttpAnswer:
        """Send a POST request and return the response; see ``request``."""
        return self.request("POST", url, body, headers, timeout)

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> HttpAnswer:
        """Send a request and return the response.

        :param timeout: in seconds, instead of the client's.
        :raises ValueError: if the URL or a header is invalid.
        :raises OSError: if the response did not arrive, or not all of it in time. The message
            omits the URL, which may be secret.
        """
        try:
            with self._send(method, url, body, headers, timeout) as response:
                text, complete = self._read(response)
        except requests.RequestException as error:
            raise _translated(error) from None
        return HttpAnswer(response.status_code, response.headers, text, complete)

    def lines(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Generator[bytes, None, None]:
        """Send a request and yield the lines of the response as they arrive.

        :raises TimeoutError: if the response is not complete in time.
        :raises ValueError: as ``request`` does.
        :raises OSError: as ``request`` does.
        """
        try:
            with self._send(method, url, body, headers, timeout) as response:
                yield from response.iter_lines(_CHUNK)
        except requests.RequestException as error:
            raise _translated(error) from None

    def close(self) -> None:
        """Close idle connections."""
        self._session.close()

    def _send(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: float | None,
    ) -> requests.Response:
        total = self.timeout if timeout is None else timeout
        return self._session.request(
            method,
            url,
            data=body,
            headers=headers,
            # requests passes urllib3's Timeout on, but its annotations do not say so.
            timeout=cast(Any, Timeout(total=total)),
            stream=True,
            allow_redirects=False,
            proxies=get_environ_proxies(url),
        )

    def _read(self, response: requests.Response) -> tuple[bytes, bool]:
        body = bytearray()
        for chunk in response.iter_content(_CHUNK):
            body += chunk
            if len(body) > self.max_answer:
                return bytes(body[: self.max_answer]), False
        return bytes(body), True


def _translated(error: requests.RequestException) -> Exception:
    cause = error.args[0] if error.args else None
    # In the middle of a body, requests reports a timeout as a lost connection.
    if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
        return TimeoutError(_reason(error))
    kind = ValueError if isinstance(error, ValueError) else ConnectionError
    return kind(_reason(error))


def _reason(error: requests.RequestException) -> str:
    """Return the message of the cause: those of ``requests`` contain the URL."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    return str(cause) if isinstance(cause, Exception) else type(error).__name__


class _BoundedReader(io.RawIOBase):
    """Reads from a socket until the socket's timeout has passed once.

    :param raw: the socket's file.
    """

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        timeout = sock.gettimeout()
        self._socket = sock
        self._raw = raw
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("The response takes too long.")
            self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_BoundedReader(sock, self.fp.detach()))


class _BoundedConnection(HTTPConnection):
    response_class = _BoundedResponse


class _BoundedTlsConnection(HTTPSConnection):
    response_class = _BoundedResponse


class _BoundedAdapter(HTTPAdapter):
    """Makes connections whose timeout bounds the whole response."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        is_tls = isinstance(pool, HTTPSConnectionPool)
        pool.ConnectionCls = _BoundedTlsConnection if is_tls else _BoundedConnection
        return pool
