"""One connection, many requests: where one ends and the next begins is never in doubt."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread

import pytest

from e2e.client import (
    BYTES,
    MB,
    TUS,
    Client,
    Connection,
    chunk,
    content,
    patch_headers,
    path_of,
    wait_until,
)
from e2e.conftest import OTHERS_READY, Serve, Server, running

ROOT = Path(__file__).parent.parent.parent

UNKNOWN = "/files/00000000000000000000000000000000"

#: Refused requests with a body: method, path (of an upload of 1000 bytes if it is empty),
#: headers, status.
REFUSALS: dict[str, tuple[str, str, Mapping[str, str | int], int]] = {
    "wrong offset": ("PATCH", "", {**BYTES, "Upload-Offset": 5}, 409),
    "no version": ("PATCH", "", {"Upload-Offset": 0, "Content-Type": BYTES["Content-Type"]}, 412),
    "wrong type": ("PATCH", "", {**TUS, "Upload-Offset": 0, "Content-Type": "text/plain"}, 415),
    "no offset": ("PATCH", "", BYTES, 400),
    "two offsets": ("PATCH", "", {**BYTES, "Upload-Offset": 0, "upload-offset": 0}, 400),
    "bad checksum": ("PATCH", "", {**BYTES, "Upload-Offset": 0, "Upload-Checksum": "md4 x"}, 400),
    "unknown upload": ("PATCH", UNKNOWN, {**BYTES, "Upload-Offset": 0}, 404),
    "bad method": ("PUT", "", {**BYTES, "Upload-Offset": 0}, 405),
    "bad metadata": (
        "POST",
        "/files/",
        {**BYTES, "Upload-Length": 10**9, "Upload-Metadata": "a b c"},
        400,
    ),
    "two lengths": ("POST", "/files/", {**BYTES, "Upload-Length": 5, "upload-length": 5}, 400),
}


def disguised(path: str, size: int) -> bytes:
    """Return a body that would delete an upload if it were taken for requests."""
    request = f"DELETE {path} HTTP/1.1\r\nHost: x\r\nTus-Resumable: 1.0.0\r\n\r\n".encode()
    return (request * (size // len(request) + 1))[:size]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("size", [1, 150, 9_000, 200_000])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_small_refused_body_keeps_the_connection(
    client: Client, refusal: str, size: int, chunked: bool
) -> None:
    method, where, headers, status = REFUSALS[refusal]
    path = client.create(10**9)
    body = disguised(path, size)
    with client.connect() as connection:
        if chunked:
            head = connection.head(
                method, where or path, {**headers, "Transfer-Encoding": "chunked"}
            )
            body = (
                chunk(body[: size // 2]) * bool(size // 2) + chunk(body[size // 2 :]) + chunk(b"")
            )
        else:
            head = connection.head(method, where or path, {**headers, "Content-Length": size})
        # The next request is on its way already.
        connection.send(head + body + connection.head("HEAD", path, TUS))
        answer = connection.read()
        assert (answer.status, answer.closes) == (status, False)
        head_answer = connection.read()
        assert (head_answer.status, head_answer.offset) == (200, 0)
        connection.pause(0.02)
        assert connection.request("HEAD", path, TUS).status == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_large_refused_body_closes_it_after_the_answer(
    client: Client, refusal: str, chunked: bool
) -> None:
    method, where, headers, status = REFUSALS[refusal]
    path = client.create(10**9)
    block = disguised(path, 100_000)
    with client.connect() as connection:
        extra = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": 50 * MB}
        connection.send_head(method, where or path, {**headers, **extra})
        answer = connection.send_until_answered(chunk(block) if chunked else block)
        assert answer.status == status
        assert answer.closes
        assert connection.is_closed()
    assert client.offset(path) == 0


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_does_not_wait_for_a_slow_client(client: Client, refusal: str) -> None:
    method, where, headers, status = REFUSALS[refusal]
    path = client.create(10**9)
    with client.connect() as chunked:
        chunked.send_head(method, where or path, {**headers, "Transfer-Encoding": "chunked"})
        chunked.send(chunk(bytes(10)))
        # Here nobody knows how long the rest is.
        answer = chunked.read()
        assert (answer.status, answer.closes) == (status, True)
    with client.connect() as slow:
        slow.send_head(method, where or path, {**headers, "Content-Length": 1000})
        slow.send(bytes(20))
        answer = slow.read()
        assert (answer.status, answer.closes) == (status, False)
        slow.send(bytes(980))
        assert slow.request("HEAD", path, TUS).offset == 0


def test_a_client_that_stops_in_a_refused_body_is_given_up(client: Client) -> None:
    path = client.create(10**9)
    with client.connect() as connection:
        connection.send(connection.head("PATCH", path, patch_headers(5, 1000)) + bytes(10))
        assert connection.read().status == 409
        assert connection.is_closed()
    assert client.offset(path) == 0


@pytest.mark.parametrize("refusal", ["wrong offset", "no version"])
def test_a_client_that_sends_all_before_it_reads(client: Client, refusal: str) -> None:
    """That is how requests does it, and with it tuspy."""
    method, _, headers, status = REFUSALS[refusal]
    path = client.create(10**9)
    with client.connect() as connection:
        connection.send_head(method, path, {**headers, "Content-Length": 50 * MB})
        connection.send(disguised(path, 50 * MB))
        answer = connection.read()
        assert answer.status == status
        if status == 409:
            assert answer.offset == 0
        assert connection.is_closed()
    assert client.offset(path) == 0


def test_more_bytes_than_the_length_allows(client: Client) -> None:
    path = client.create(1000)
    with client.connect() as connection:
        answer = connection.request("PATCH", path, patch_headers(0), bytes(1001))
        assert answer.status == 413
        assert connection.request("HEAD", path, TUS).offset == 0
        headers = {**patch_headers(0), "Transfer-Encoding": "chunked"}
        connection.send_head("PATCH", path, headers)
        connection.send(chunk(content(700)) + chunk(content(700)) + chunk(b""))
        assert connection.read().status == 413
        assert connection.request("HEAD", path, TUS).offset <= 1000


def test_a_body_that_is_larger_than_announced_is_the_next_request(client: Client) -> None:
    path = client.create(1000)
    with client.connect() as connection:
        connection.send(connection.head("PATCH", path, patch_headers(0, 4)) + b"1234")
        connection.send(b"5678\r\n\r\n")
        assert connection.read().status == 204
        assert connection.read().status == 400
        assert connection.is_closed()
    assert client.offset(path) == 4


def expecting(connection: Connection, path: str, offset: int, length: int | None) -> None:
    body = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": length}
    headers = {**patch_headers(offset), **body, "Expect": "100-continue"}
    connection.send_head("PATCH", path, headers)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_expect_100(client: Client, chunked: bool) -> None:
    data = content(500_000)
    path = client.create(len(data))
    with client.connect() as connection:
        for start in range(0, len(data), 250_000):
            block = data[start : start + 250_000]
            expecting(connection, path, start, None if chunked else len(block))
            assert connection.read_interim() == 100
            connection.send(chunk(block) + chunk(b"") if chunked else block)
            answer = connection.read()
            assert (answer.status, answer.offset) == (204, start + len(block))
    assert client.get(path).body == data


@pytest.mark.parametrize("length", [10, 50 * MB, None])
def test_a_refusal_comes_without_a_100(client: Client, length: int | None) -> None:
    path = client.create(10**9)
    with client.connect() as connection:
        expecting(connection, path, 77, length)
        answer = connection.read()
        assert (answer.status, answer.interim) == (409, ())
        # Nobody knows whether the client sends its body after that.
        assert answer.closes
        assert connection.is_closed()


def test_a_client_that_expects_but_does_not_wait(client: Client) -> None:
    data = content(100_000)
    path = client.create(len(data))
    with client.connect() as connection:
        expecting(connection, path, 0, len(data))
        connection.send(data)
        connection.send(connection.head("HEAD", path, TUS))
        assert connection.read().status == 204
        assert connection.read().offset == len(data)


def test_a_client_that_expects_and_is_gone(client: Client) -> None:
    # The server's log has no traceback: whoever stops the server looks.
    path = client.create(1000)
    for length in (1000, None):
        for _ in range(20):
            connection = client.connect()
            expecting(connection, path, 0, length)
            connection.reset()
    assert client.offset(path) == 0


def test_no_100_for_http_1_0(client: Client) -> None:
    path = client.create(4)
    with client.connect() as connection:
        headers = {**patch_headers(0, 4), "Expect": "100-continue"}
        connection.send(connection.head("PATCH", path, headers, version="1.0") + b"data")
        answer = connection.read()
        assert (answer.status, answer.interim) == (204, ())


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The application under gunicorn's own gevent worker."""
    data_dir = tmp_path_factory.mktemp("stock") / "data"
    environ = {"TUSWSGI_DATA_DIR": str(data_dir), "PYTHONPATH": str(ROOT)}
    command = [
        *(sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "2", "-b", "127.0.0.1:0"),
        *("--no-control-socket", "--chdir", str(ROOT), "wsgi:application"),
    ]
    with running(Server(command, data_dir, environ, ready=OTHERS_READY)) as server:
        yield server


def test_expect_100_under_the_stock_worker(stock: Server) -> None:
    client, data = stock.client, content(100_000)
    path = client.create(len(data))
    with client.connect() as connection:
        expecting(connection, path, 0, len(data))
        assert connection.read_interim() == 100
        connection.send(data)
        assert connection.read().status == 204
    assert client.get(path).body == data
    with client.connect() as connection:
        expecting(connection, path, 5, 10)
        # Here the 100 comes before anybody looked at the request.
        assert connection.read_interim() == 100
        connection.send(disguised(path, 10))
        assert connection.read().status == 409
        assert connection.request("HEAD", path, TUS).status == 200


def test_refusals_under_the_stock_worker(stock: Server) -> None:
    client = stock.client
    path = client.create(10**9)
    for size in (100, 200_000):
        with client.connect() as connection:
            body = disguised(path, size)
            assert connection.request("PATCH", path, patch_headers(5), body).status == 409
            assert connection.request("HEAD", path, TUS).offset == 0
    with client.connect() as connection:
        connection.send_head("PATCH", path, patch_headers(5, 50 * MB))
        answer = connection.send_until_answered(disguised(path, 100_000))
        assert answer.status == 409
        assert connection.is_closed()
    assert client.offset(path) == 0


def test_a_row_of_requests_at_once(client: Client) -> None:
    data = content(30_000)
    path = client.create(len(data))
    with client.connect() as connection:
        row = b""
        for start in range(0, len(data), 3_000):
            block = data[start : start + 3_000]
            if start % 2:
                headers = {**patch_headers(start), "Transfer-Encoding": "chunked"}
                row += connection.head("PATCH", path, headers) + chunk(block) + chunk(b"")
            else:
                row += connection.head("PATCH", path, patch_headers(start, len(block))) + block
            row += connection.head("HEAD", path, TUS)
        row += connection.head("GET", path, {})
        connection.send(row)
        for start in range(0, len(data), 3_000):
            for status in (204, 200):
                answer = connection.read()
                assert (answer.status, answer.offset) == (status, start + 3_000)
        assert connection.read().body == data


def test_a_long_row_holds_up_nobody_else(serve: Serve) -> None:
    server, count, answers = serve(workers=1), 5_000, bytearray()
    path = server.client.create(1)
    with server.client.connect() as greedy, server.client.connect() as other:
        assert other.request("HEAD", path, TUS).status == 200
        row = greedy.head("HEAD", path, TUS) * count

        def read() -> None:
            while answers.count(b"HTTP/1.1 200") < count:
                answers.extend(greedy.sock.recv(MB))

        threads = [Thread(target=read), Thread(target=greedy.send, args=[row])]
        for thread in threads:
            thread.start()
        wait_until(lambda: answers, "the first of the row")
        assert other.request("HEAD", path, TUS).status == 200
        assert answers.count(b"HTTP/1.1 200") < count
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_requests_cut_anywhere(client: Client, chunked: bool) -> None:
    data = content(200_000)
    path = client.create(len(data))
    with client.connect() as connection:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), 20_000):
            block = data[start : start + 20_000]
            if chunked:
                head = {**patch_headers(start), "Transfer-Encoding": "chunked"}
                wire = connection.head("PATCH", path, head)
                wire += chunk(block[:7]) + chunk(block[7:]) + chunk(b"")
            else:
                wire = connection.head("PATCH", path, patch_headers(start, 20_000)) + block
            wire += connection.head("HEAD", path, TUS)
            # Byte by byte around the end of the head, and in a few more places.
            edge = wire.index(b"\r\n\r\n")
            cuts = {*range(edge - 2, edge + 8), *random.sample(range(1, len(wire)), 8)}
            cuts |= {len(wire) - n for n in range(1, 4)}
            for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(wire)], strict=True):
                connection.send(wire[begin:end])
            assert connection.read().offset == start + 20_000
            assert connection.read().offset == start + 20_000
    assert client.get(path).body == data


def test_a_request_byte_by_byte(client: Client) -> None:
    path = client.create(10)
    with client.connect() as connection:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = {**patch_headers(0), "Transfer-Encoding": "chunked"}
        wire = connection.head("PATCH", path, headers) + chunk(b"01234") + chunk(b"56789")
        for byte in wire + chunk(b""):
            connection.send(bytes([byte]))
        assert connection.read().offset == 10
    assert client.get(path).body == b"0123456789"


@pytest.mark.parametrize("headers", [{"Content-Length": 0}, {"Transfer-Encoding": "chunked"}, {}])
def test_bodies_without_bytes(client: Client, headers: dict[str, str | int]) -> None:
    path = client.create(4)
    end = chunk(b"") if "Transfer-Encoding" in headers else b""
    with client.connect() as connection:
        for offset, part in ((0, b"12"), (2, b"34"), (4, b"")):
            connection.send(connection.head("PATCH", path, {**patch_headers(offset), **headers}))
            connection.send(end)
            answer = connection.read()
            assert (answer.status, answer.offset) == (204, offset)
            if part:
                assert connection.request("PATCH", path, patch_headers(offset), part).status == 204
        # Creation with a body of no bytes.
        connection.send(
            connection.head("POST", "/files/", {**BYTES, "Upload-Length": 5, **headers})
        )
        connection.send(end)
        assert connection.read().status == 201
    assert client.get(path).body == b"1234"


def test_an_empty_upload(client: Client) -> None:
    path = client.create(0)
    assert client.offset(path) == 0
    response = client.get(path)
    assert (response.status, response.body) == (200, b"")
    assert client.patch(path, 0, b"").status == 204


def test_http_1_0(client: Client) -> None:
    data = content(50_000)
    with client.connect() as connection:
        head = connection.head("POST", "/files/", {**TUS, "Upload-Length": 50_000}, version="1.0")
        connection.send(head)
        created = connection.read()
        assert created.status == 201
        assert connection.is_closed()
    path = path_of(created)
    with client.connect() as connection:
        headers = patch_headers(0, len(data))
        connection.send(connection.head("PATCH", path, headers, version="1.0") + data)
        assert connection.read().offset == len(data)
        assert connection.is_closed()
    with client.connect() as connection:
        connection.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert connection.read().body == data


def test_http_1_1_needs_a_host(client: Client) -> None:
    path = client.create(10)
    for request in (
        f"HEAD {path} HTTP/1.1\r\nTus-Resumable: 1.0.0\r\n\r\n",
        "OPTIONS /files/ HTTP/1.1\r\n\r\n",
        f"GET {path} HTTP/1.1\r\n\r\n",
        "POST /files/ HTTP/1.1\r\nTus-Resumable: 1.0.0\r\nUpload-Length: 5\r\n\r\n",
    ):
        with client.connect() as connection:
            connection.send(request.encode() + b"")
            connection.half_close()
            assert connection.read_rest().startswith(b"HTTP/1.1 400 "), request


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 4\r\nContent-Length: 5\r\n",
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: +4\r\n",
        "Content-Length: 4, 4\r\n",
        "Content-Length: -1\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
    ],
)
def test_a_body_whose_end_is_unclear_is_refused(client: Client, framing: str) -> None:
    path = client.create(100)
    with client.connect() as connection:
        connection.send(
            f"PATCH {path} HTTP/1.1\r\nHost: x\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
            f"Content-Type: {BYTES['Content-Type']}\r\n{framing}\r\n".encode()
            + b"4\r\n0123\r\n0\r\n\r\n"
        )
        answer = connection.read()
        assert answer.status in (400, 501)
        assert connection.is_closed()
    assert client.offset(path) == 0


@pytest.mark.parametrize("coding", ["gzip, chunked", "identity, chunked", "deflate,chunked"])
def test_a_body_that_is_coded_is_not_kept(client: Client, coding: str) -> None:
    path = client.create(100)
    for method, where in (("PATCH", path), ("POST", "/files/")):
        with client.connect() as connection:
            headers = {**patch_headers(0), "Upload-Length": 100, "Transfer-Encoding": coding}
            connection.send(connection.head(method, where, headers) + chunk(b"coded") + chunk(b""))
            answer = connection.read()
            assert answer.status == 501
            assert b"transfer coding" in answer.body
            assert "location" not in answer.headers
    assert client.offset(path) == 0


def test_the_host_of_the_target_wins(client: Client) -> None:
    with client.connect() as connection:
        headers = {**TUS, "Upload-Length": 5, "Host": "other.org"}
        connection.send_head("POST", "http://example.org:80/files/", headers)
        created = connection.read()
    assert created.status == 201
    assert created.headers["location"].startswith("http://example.org/files/")
    assert client.offset(path_of(created)) == 0


def test_a_head_whose_lines_end_without_cr_is_refused_at_once(client: Client) -> None:
    with client.connect() as connection:
        connection.send(b"OPTIONS /files/ HTTP/1.1\nHost: x\n\n")
        assert connection.read().status == 400
        assert connection.is_closed()
