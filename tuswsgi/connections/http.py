"""Connections to HTTP servers that are asked on behalf of a request which waits.

This file owns how they are kept for the next question and how long an answer may take as
a whole: what ``requests`` bounds by itself is each single wait for bytes, so that a server
that sends a byte now and then could hold a client for ever. What is asked, and what an
answer means, is for others to say.
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
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Timeout

#: How many idle connections are kept for each server.
_IDLE_CONNECTIONS = 256

_CHUNK = 8192


@dataclass(frozen=True)
class HttpAnswer:
    """What a server answered.

    :param headers: by their names in any case.
    :param body: as much of the body as was wanted.
    :param complete: whether that is all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    complete: bool

    @property
    def content_type(self) -> str | None:
        return self.headers.get("Content-Type")


class HttpClient:
    """Sends requests for all greenlets or threads of this process.

    Its connections stay open for the next request. It keeps no cookies, and follows no
    redirects. Of the environment it takes the proxies (``HTTPS_PROXY``, ``NO_PROXY``, ...)
    and the certificate authorities (``REQUESTS_CA_BUNDLE``), but no ``.netrc``: that would
    replace the credentials that a request carries.

    :param timeout: for a request and its response together, in seconds. Only looking up
        a server's name has a limit of its own, the resolver's.
    :param max_answer: how many bytes of a body are read.
    """

    def __init__(self, timeout: float, max_answer: int) -> None:
        self.timeout = timeout
        self.max_answer = max_answer
        self._session = session = requests.Session()
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.headers.clear()
        # Not to be compressed: a body is bounded as it comes.
        session.headers.update({"User-Agent": "tuswsgi", "Accept-Encoding": "identity"})
        for scheme in ("http://", "https://"):
            session.mount(scheme, _BoundedAdapter(pool_maxsize=_IDLE_CONNECTIONS))

    def post(
        self, url: str, body: bytes, headers: Mapping[str, str], timeout: float | None = None
    ) -> HttpAnswer:
        """Send a POST request and return the answer; see ``request``."""
        return self.request("POST", url, body, headers, timeout)

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> HttpAnswer:
        """Send a request and return the answer.

        :param timeout: in seconds, instead of the client's.
        :raises ValueError: if the URL or a header cannot be sent.
        :raises OSError: if there was no answer, or not all of it in time. The message does
            not tell the URL, which may be a secret.
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
        """Send a request and yield the lines of its answer, each as soon as it has come.

        :raises TimeoutError: if the time is over and the answer is not.
        :raises ValueError: as ``request`` does, and likewise ``OSError``.
        """
        try:
            with self._send(method, url, body, headers, timeout) as response:
                yield from response.iter_lines(_CHUNK)
        except requests.RequestException as error:
            raise _translated(error) from None

    def close(self) -> None:
        """Close the connections that are idle."""
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
            # Any: what urllib3 takes and requests hands on.
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
    # requests tells of the time that is over in mid-body as of a lost connection.
    if isinstance(error, requests.Timeout) or isinstance(cause, ReadTimeoutError):
        return TimeoutError(_reason(error))
    kind = ValueError if isinstance(error, ValueError) else ConnectionError
    return kind(_reason(error))


def _reason(error: requests.RequestException) -> str:
    """Return what went wrong below ``requests``, whose own messages contain the URL."""
    cause = error.args[0] if error.args else error
    cause = getattr(cause, "reason", cause)
    return str(cause) if isinstance(cause, Exception) else type(error).__name__


class _BoundedAdapter(HTTPAdapter):
    """Uses connections whose timeout is for all of a response."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager


class _BoundedReader(io.RawIOBase):
    """Reads from a socket until the socket's timeout is over, counted from now on.

    :param raw: the file of the socket.
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


class _BoundedPool(HTTPConnectionPool):
    ConnectionCls = _BoundedConnection


class _BoundedTlsPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedTlsConnection


_POOLS = {"http": _BoundedPool, "https": _BoundedTlsPool}
