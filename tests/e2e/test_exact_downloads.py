"""Downloads that do not go well: clients that stop reading, and files that shrink."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator

import pytest

from e2e.client import PATIENCE, TUS, Connection
from e2e.conftest import SERVE, Server, running

#: More than sockets take without a reader.
SIZE = 30_000_000


@pytest.fixture(scope="module", params=["plain", "tls"])
def impatient(
    request: pytest.FixtureRequest,
    tls_flags: tuple[list[str], ssl.SSLContext],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """A server with one worker that waits for no client longer than 2 s."""
    flags, tls = tls_flags if request.param == "tls" else ([], None)
    data_dir = tmp_path_factory.mktemp("downloads") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--network-timeout", "2s"]
    with running(Server([*command, "--workers", "1", *flags], data_dir, tls=tls)) as server:
        yield server


@pytest.fixture
def path(impatient: Server) -> str:
    """An upload of zeros, most of which are not on the disk."""
    client = impatient.client
    path = client.create(SIZE)
    os.truncate(impatient.file(path), SIZE - 1)
    assert client.patch(path, SIZE - 1, b"x").status == 204
    return path


def start_download(connection: Connection, path: str) -> None:
    connection.send_head("GET", path, {})
    connection.wait_for_bytes()


def test_a_client_that_stops_reading_is_given_up_and_a_slow_one_not(
    impatient: Server, path: str
) -> None:
    client = impatient.client
    with client.connect() as stopped, client.connect() as slow:
        start_download(stopped, path)
        slow.send_head("GET", path, {"Connection": "close"})
        blocks, deadline = [], time.monotonic() + PATIENCE
        while impatient.holds(stopped):
            blocks.append(slow.sock.recv(200_000))
            time.sleep(0.3)
            assert time.monotonic() < deadline, "waited in vain for the end of a connection"
        with pytest.raises(ConnectionError):
            stopped.read()
        while block := slow.sock.recv(1_000_000):
            blocks.append(block)
    head, _, body = b"".join(blocks).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert (len(body), body[-1:]) == (SIZE, b"x")


def test_a_file_that_shrinks_ends_the_connection(impatient: Server, path: str) -> None:
    start = impatient.log_length
    with impatient.client.connect() as connection:
        start_download(connection, path)
        # This must not be answered: nobody could tell the answer from the file.
        connection.send_head("HEAD", path, TUS)
        os.truncate(impatient.file(path), SIZE // 2)
        with pytest.raises(ConnectionError):
            connection.read()
    impatient.wait_for("ended too soon", start)
