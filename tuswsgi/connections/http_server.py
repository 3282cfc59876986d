"""HTTP servers such as etcd and Consul, at one or several addresses.

A request is repeated at the next address when one fails. It must be idempotent, because a server
that failed may have executed it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.http import HttpAnswer, HttpClient
from tuswsgi.connections.pool import Pool, PoolSettings
from tuswsgi.core.errors import ConfigurationError, Unavailable

log = logging.getLogger(__name__)

#: The largest response, in bytes: the names of all locks of a process.
_MAX_ANSWER = 16 * 2**20


@dataclass(frozen=True)
class Addresses:
    """The addresses of a server, and the credentials.

    :param urls: scheme, host and port of each address.
    """

    urls: tuple[str, ...]
    user: str | None
    password: str | None

    @classmethod
    def parse(cls, dsn: str, default_port: int) -> Addresses:
        """Parse ``http://[user[:password]@]host[:port][,http://host2...]``.

        :raises ConfigurationError: if it is something else. The message does not repeat the
            DSN, which may contain a password.
        """
        try:
            dsns = [Dsn.parse(one.strip()) for one in dsn.split(",")]
            urls = tuple(_url(one, default_port) for one in dsns)
        except ValueError:
            raise ConfigurationError(
                "The DSN is not understood. Supported: http://host:port and "
                "https://user:password@host:port, several separated by commas."
            ) from None
        login = next((one for one in dsns if one.user or one.password), dsns[0])
        return cls(urls, login.user, login.password)


def _url(dsn: Dsn, default_port: int) -> str:
    if dsn.scheme not in ("http", "https") or len(dsn.hosts) != 1 or dsn.path.strip("/"):
        raise ValueError("not the address of an HTTP server")
    (host,) = dsn.hosts
    name = f"[{host.name}]" if ":" in host.name else host.name
    return f"{dsn.scheme}://{name}:{host.port or default_port}"


class HttpServer:
    """A server, for all greenlets or threads of a process.

    :param name: its name in the log.
    """

    def __init__(self, name: str, urls: tuple[str, ...], settings: PoolSettings) -> None:
        self._name = name
        self._urls = urls
        self._good = 0
        self._is_away = False
        #: Seconds for a request, at all addresses together.
        self.timeout = settings.pool_timeout
        self._pool = Pool(settings, self._open, HttpClient.close)
        # Long polls have a client of their own, so that they never use up the pool.
        self._listener = self._open()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        """Send a request to the first address that responds, and return the response.

        :raises Unavailable: if no address responds with a status below 500. The first failure
            is logged.
        """
        with self._pool.connection() as client:
            return self._ask_in_turn(client, method, path, body, headers, self.timeout)

    def wait(self, path: str, headers: Mapping[str, str], seconds: float) -> HttpAnswer:
        """Send a GET request that the server may answer after up to `seconds` (a long poll).

        Only one thread may use ``wait`` and ``lines``.

        :raises Unavailable: as ``request`` does.
        """
        timeout = self.timeout + seconds
        return self._ask_in_turn(self._listener, "GET", path, None, headers, timeout)

    def lines(
        self, path: str, body: bytes, headers: Mapping[str, str], seconds: float
    ) -> Generator[bytes, None, None]:
        """Send a POST request and yield the lines of the response for `seconds`.

        Only one thread may use ``wait`` and ``lines``.

        :raises Unavailable: if there is no response, or it breaks off.
        """
        url = self._urls[self._good] + path
        try:
            with closing(self._listener.lines("POST", url, body, headers, seconds)) as lines:
                for line in lines:
                    self._found(self._good)
                    yield line
        except TimeoutError:
            return
        except (OSError, ValueError) as error:
            self._good = (self._good + 1) % len(self._urls)
            self._lost(str(error))
            raise Unavailable from None

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()
        self._listener.close()

    def _ask_in_turn(
        self,
        client: HttpClient,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: float,
    ) -> HttpAnswer:
        deadline = time.monotonic() + timeout
        first = self._good
        for number in range(len(self._urls)):
            index = (first + number) % len(self._urls)
            left = (deadline - time.monotonic()) / (len(self._urls) - number)
            try:
                answer = client.request(
                    method, self._urls[index] + path, body, headers, max(left, 0.001)
                )
            except (OSError, ValueError) as error:
                reason = str(error)
                continue
            if answer.status < 500 and answer.complete:
                self._found(index)
                return answer
            reason = f"{answer.status} {answer.body[:200].decode(errors='replace')}"
        self._lost(reason)
        raise Unavailable

    def _found(self, index: int) -> None:
        self._good = index
        if self._is_away:
            self._is_away = False
            log.warning("%s responds again", self._name)

    def _lost(self, reason: str) -> None:
        if not self._is_away:
            self._is_away = True
            log.error("%s does not respond: %s", self._name, reason)

    def _open(self) -> HttpClient:
        return HttpClient(self.timeout, _MAX_ANSWER)
