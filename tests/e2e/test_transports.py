"""TLS and unix sockets: what is special about their connections."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.client import PATIENCE, TUS, Connection, chunk, content, patch_headers, sha1, wait_until
from e2e.conftest import SERVE, Serve, Server, running

SIZE = 20_000_000


@pytest.fixture(scope="module")
def secure(
    tls_flags: tuple[list[str], ssl.SSLContext], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("secure") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "2", *tls_flags[0]]
    with running(Server(command, data_dir, tls=tls_flags[1])) as server:
        yield server


def send(connection: Connection, data: bytes, *, chunked: bool) -> None:
    connection.send(chunk(data) if chunked else data)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_upload_over_tls(secure: Server, chunked: bool) -> None:
    client, data = secure.client, content(SIZE)
    created = client.request("POST", "/files/", {**TUS, "Upload-Length": SIZE})
    assert created.headers["location"].startswith(f"https://{client.origin.host}/files/")
    path = client.create(SIZE)
    with client.start_patch(path, 0, None if chunked else SIZE) as connection:
        for start in range(0, SIZE, 1_700_001):
            send(connection, data[start : start + 1_700_001], chunked=chunked)
        if chunked:
            connection.send(chunk(b""))
        # The connection is where the next request begins.
        connection.send(connection.head("HEAD", path, TUS))
        assert connection.read().offset == SIZE
        assert connection.read().offset == SIZE
    assert client.get(path).body == data
    assert client.get(path, Range="bytes=100-1000099").body == data[100:1_000_100]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_abort_over_tls(secure: Server, how: str, chunked: bool) -> None:
    client, data = secure.client, content(SIZE)
    path = client.create(SIZE)
    for offset in range(0, 9_000_000, 3_000_000):
        with client.start_patch(path, offset, None if chunked else SIZE - offset) as connection:
            send(connection, data[offset : offset + 3_000_000], chunked=chunked)
            wait_until(lambda end=offset + 3_000_000: secure.stored(path) == end, "bytes on disk")
            getattr(connection, how)()
        assert client.offset(path) == offset + 3_000_000
    client.finish(path, data)
    assert client.get(path).body == data


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_takeover_over_tls(secure: Server, chunked: bool) -> None:
    client, data = secure.client, content(2_000_000)
    path = client.create(len(data))
    for offset in range(0, 1_800_000, 100_001):
        length = len(data) - offset
        with client.start_patch(path, offset, None if chunked else length) as connection:
            send(connection, data[offset : offset + 100_001], chunked=chunked)
            wait_until(lambda end=offset + 100_001: secure.stored(path) == end, "bytes on disk")
            assert client.offset(path) == offset + 100_001
            answer = connection.read()
            assert (answer.status, answer.closes) == (423, True)
            assert "retry-after" in answer.headers
    client.finish(path, data)
    assert client.get(path).body == data


def test_a_client_that_never_pauses_lets_go_over_tls(secure: Server) -> None:
    client, size = secure.client, 10_000_000_000
    path = client.create(size)
    with client.start_patch(path, 0, size) as connection:
        connection.send(bytes(3_000_000))
        wait_until(lambda: secure.stored(path) == 3_000_000, "bytes on disk")
        with client.connect() as other:
            other.send_head("HEAD", path, TUS)
            answer = connection.send_until_answered(bytes(100_000))
            assert answer.status == 423
            assert other.read().offset == secure.stored(path)
    assert client.request("DELETE", path, TUS).status == 204


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_small_refused_body_over_tls(secure: Server, size: int) -> None:
    path = secure.client.create(10**9)
    with secure.client.connect() as connection:
        row = connection.head("PATCH", path, patch_headers(5, size)) + bytes(size)
        connection.send(row + connection.head("HEAD", path, TUS))
        assert connection.read().status == 409
        assert connection.read().offset == 0


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_large_refused_body_over_tls(secure: Server, chunked: bool) -> None:
    path = secure.client.create(10**9)
    with secure.client.start_patch(path, 5, None if chunked else 50_000_000) as connection:
        block = chunk(bytes(100_000)) if chunked else bytes(100_000)
        answer = connection.send_until_answered(block)
        assert (answer.status, answer.offset, answer.closes) == (409, 0, True)
    assert secure.client.offset(path) == 0


def test_checksums_over_tls(secure: Server) -> None:
    client, data = secure.client, content(3_000_000)
    path = client.create(len(data))
    assert client.patch(path, 0, data[:9], Upload_Checksum=sha1(b"else")).status == 460
    answer = client.patch(path, 0, data, Upload_Checksum=sha1(data))
    assert (answer.status, answer.offset) == (204, len(data))
    assert client.get(path).body == data


def test_expect_100_over_tls(secure: Server) -> None:
    path = secure.client.create(4)
    with secure.client.connect() as connection:
        headers = {**patch_headers(0, 4), "Expect": "100-continue"}
        connection.send_head("PATCH", path, headers)
        assert connection.read_interim() == 100
        connection.send(b"data")
        assert connection.read().status == 204


def test_stop_over_tls(serve: Serve, tls_flags: tuple[list[str], ssl.SSLContext]) -> None:
    server, data = serve(*tls_flags[0], tls=tls_flags[1]), content(1_000_000)
    path = server.client.create(len(data))
    with (
        server.client.start_patch(path, 0, len(data)) as connection,
        # This one does not even begin with TLS.
        socket.create_connection(server.client.origin.address),
    ):
        connection.send(data[:500_000])
        wait_until(lambda: server.stored(path) == 500_000, "bytes on disk")
        server.signal(signal.SIGTERM)
        answer = connection.read()
        assert (answer.status, answer.closes) == (503, True)
        connection.close()
        assert server.wait(20) == 0
    server.restart()
    assert server.client.offset(path) == 500_000


def test_plain_http_at_a_tls_port(secure: Server) -> None:
    address = secure.client.origin.address
    with socket.create_connection(address, timeout=PATIENCE) as sock:  # type: ignore[arg-type]
        sock.sendall(b"GET /files/ HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            while sock.recv(1000):
                pass
        except ConnectionResetError:
            pass  # that is an end, too
    assert secure.client.request("OPTIONS", "/files/", {}).status == 204


def test_upload_through_a_unix_socket(serve: Serve, tmp_path: Path) -> None:
    server = serve("--unix-sock", str(tmp_path / "tus.sock"))
    client, data = server.client, content(3_000_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, len(data)) as connection:
        connection.send(data[:1_000_000])
    wait_until(lambda: server.stored(path) == 1_000_000, "bytes on disk")
    with client.start_patch(path, 1_000_000, None) as connection:
        connection.send(chunk(data[1_000_000:2_000_000]))
        wait_until(lambda: server.stored(path) == 2_000_000, "bytes on disk")
        assert client.offset(path) == 2_000_000
        assert connection.read().status == 423
    with client.connect() as connection:
        connection.send_head("PATCH", path, patch_headers(0, 50_000_000))
        assert connection.send_until_answered(bytes(100_000)).status == 409
    client.finish(path, data)
    assert client.get(path).body == data
