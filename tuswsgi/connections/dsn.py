"""DSNs: the URLs that say where a server is and how to log in to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit


class Host(NamedTuple):
    """An address of a server.

    :param port: ``None`` for the server's default.
    """

    name: str
    port: int | None


@dataclass(frozen=True)
class Dsn:
    """``scheme://user:password@host:port,host2:port2/path?key=value``, parsed and decoded.

    :param path: without the slash that separates it from the hosts.
    """

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    hosts: tuple[Host, ...]
    path: str
    parameters: Mapping[str, str] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Dsn:
        """Parse a DSN. Every part but the scheme may be missing.

        :raises ValueError: if `text` is not a DSN. Don't show the message to anyone: it may
            quote a password that was not percent-encoded.
        """
        # urlsplit knows a single host.
        scheme, separator, rest = text.partition("://")
        if not separator or "#" in rest:
            raise ValueError("no scheme, or a # that is not percent-encoded")
        rest, _, query = rest.partition("?")
        netloc, _, path = rest.partition("/")
        userinfo, _, hosts = netloc.rpartition("@")
        user, _, password = userinfo.partition(":")
        return cls(
            scheme.lower(),
            unquote(user) or None,
            unquote(password) or None,
            tuple(map(_host, hosts.split(","))) if hosts else (),
            unquote(path),
            dict(parse_qsl(query, strict_parsing=bool(query))),
        )

    def __str__(self) -> str:
        """Return the DSN without its secrets."""
        hosts = ",".join(map(_shown, self.hosts))
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{hosts}{path}"


def _host(text: str) -> Host:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return Host(unquote(parts.hostname), parts.port)


def _shown(host: Host) -> str:
    name = f"[{host.name}]" if ":" in host.name else host.name
    return name if host.port is None else f"{name}:{host.port}"
