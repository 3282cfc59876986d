"""Where a database server is, taken from a DSN that looks like a URL.

It never tells a part of the DSN in an error: whatever is wrong in it, a password that was
not percent-encoded may be what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from tuswsgi.core.errors import ConfigurationError


@dataclass(frozen=True)
class Address:
    """A database on a server.

    :param port: ``None`` for the server's usual one.
    :param parameters: what stands behind the ``?``, for the driver.
    """

    host: str | None
    port: int | None
    user: str | None
    password: str | None = field(repr=False)
    database: str
    parameters: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, dsn: str) -> Address:
        """Return what `dsn` says: ``scheme://user:password@host:port/database?key=value``.

        :raises ConfigurationError: if it is something else.
        """
        try:
            parts = urlsplit(dsn)
            database = unquote(parts.path.removeprefix("/"))
            parameters = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            if not database or parts.fragment:
                raise ValueError("no database, or a # that is not encoded")
            return cls(
                host=unquote(parts.hostname) if parts.hostname else None,
                port=parts.port,
                user=unquote(parts.username) if parts.username else None,
                password=unquote(parts.password) if parts.password else None,
                database=database,
                parameters=parameters,
            )
        except ValueError:
            raise ConfigurationError(
                "The database DSN is not like scheme://user:password@host:port/database. "
                "Special characters of the user and the password must be percent-encoded."
            ) from None

    def __str__(self) -> str:
        """Return what may be shown to people."""
        port = f":{self.port}" if self.port else ""
        return f"{self.database} on {self.host or 'this host'}{port}"
