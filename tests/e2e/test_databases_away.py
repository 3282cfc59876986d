"""A database that is away: servers begin without it, say whose fault it is, and go on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from e2e.client import content, wait_until
from e2e.conftest import Serve, Server, free_port


class Gate:
    """Passes connections on to the database while it is open, and keeps them waiting while not."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = port
        self.hangs = False
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", 5432))
            self._pairs += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while block := one.recv(65536):
                while self.hangs:
                    time.sleep(0.02)
                other.sendall(block)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._pairs:
            one.close()


@pytest.fixture
def database() -> Iterator[str]:
    psycopg = pytest.importorskip("psycopg")
    name = f"away_{free_port()}"
    try:
        connection = psycopg.connect("postgresql://postgres@127.0.0.1/postgres", autocommit=True)
    except psycopg.OperationalError as error:
        pytest.skip(f"There is no PostgreSQL: {error}")
    with closing(connection):
        connection.execute(f"CREATE DATABASE {name}")
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def opened(port: int) -> Iterator[Gate]:
    gate = Gate(port)
    try:
        yield gate
    finally:
        gate.hangs = False
        gate.close()


def checks(server: Server) -> dict[str, str]:
    return dict(json.loads(server.client.request("GET", "/ready", {}).body)["checks"])


def test_a_database_that_is_away_at_boot(serve: Serve, database: str) -> None:
    port = free_port()
    dsn = f"postgres://postgres@127.0.0.1:{port}/{database}"
    server, data = serve("--info-db-dsn", dsn, "--locker", "file-locker"), content(10)
    server.wait_for("uploads are refused until it is")
    creation = server.client.request(
        "POST", "/files/", {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
    )
    assert (creation.status, creation.headers["retry-after"]) == (503, "1")
    for _ in range(30):
        found = checks(server)
        assert found.pop("info_store") == "It cannot be used; the log says why."
        assert set(found.values()) == {"ok"}
    # Once in the master and in each worker.
    assert server.log.count("Connection refused") <= 2 * 3
    assert server.log.count("Not ready: info_store") <= 2
    with opened(port):
        wait_until(lambda: set(checks(server).values()) == {"ok"}, "a server that is ready")
        wait_until(
            lambda: [set(checks(server).values()) for _ in range(8)] == [{"ok"}] * 8, "all workers"
        )
        path = server.client.create(10)
        assert server.client.patch(path, 0, data).status == 204


def test_a_database_that_hangs(serve: Serve, database: str) -> None:
    port = free_port()
    dsn = f"postgres://postgres@127.0.0.1:{port}/{database}"
    with opened(port) as gate:
        server = serve("--info-db-dsn", dsn, "--locker", "file-locker", workers=1)
        assert set(checks(server).values()) == {"ok"}
        gate.hangs = True
        wait_until(lambda: checks(server)["info_store"] != "ok", "somebody who notices")
        for _ in range(10):
            found = checks(server)
            assert found.pop("info_store") != "ok"
            assert set(found.values()) == {"ok"}
        assert server.log.count("Not ready: info_store") <= 2
        gate.hangs = False
        wait_until(lambda: set(checks(server).values()) == {"ok"}, "a server that is ready")
