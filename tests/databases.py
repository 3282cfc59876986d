"""Empty databases on the servers of this machine, one for each test that asks."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pymysql
from services import find

#: So few that several runs of tests fit into a server's limit.
POOL_SIZE = 5


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the DSN of a schema of PostgreSQL's, which is removed afterwards."""
    url = postgres_url()
    name = f"tuswsgi_{secrets.token_hex(6)}"
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(f"CREATE SCHEMA {name}".encode())
        try:
            yield f"{url}?options=-csearch_path%3D{name}&application_name={name}"
        finally:
            server.execute(f"DROP SCHEMA {name} CASCADE".encode())


@contextmanager
def sorted_postgres() -> Iterator[str]:
    """Yield the DSN of a database whose texts are sorted as people of some language do."""
    url = postgres_url()
    name = f"tuswsgi_{secrets.token_hex(6)}"
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 LOCALE_PROVIDER icu "
            "ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'".encode()
        )
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def mysql() -> Iterator[str]:
    """Yield the DSN of a database of MySQL's, which is removed afterwards."""
    url = mysql_url()
    name = f"tuswsgi_{secrets.token_hex(6)}"
    server = mysql_server(url)
    cursor = server.cursor()
    cursor.execute(f"CREATE DATABASE {name} CHARACTER SET latin1")
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        cursor.execute(f"DROP DATABASE {name}")
        server.close()


def postgres_url() -> str:
    return find("TEST_POSTGRES_URL", "postgres://postgres@127.0.0.1:5432/postgres")


def mysql_url() -> str:
    return find("TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/")


def mysql_server(url: str) -> pymysql.Connection[Any]:
    parts = urlsplit(url)
    return pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=parts.username,
        password=parts.password or "",
        autocommit=True,
    )


#: By the kind of server.
SERVERS = {"postgres": postgres, "mysql": mysql}


def other_spelling(dsn: str) -> str:
    """Return another DSN of the same database, for which there are other connections."""
    return dsn.replace("@127.0.0.1", "@localhost")
