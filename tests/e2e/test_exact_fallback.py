"""A gunicorn with internals that nobody knows: slower, and everything works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.client import TUS, chunk, content, patch_headers, sha1, wait_until
from e2e.conftest import Server, app_server, running


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("strange") / "data"
    with running(app_server("strange_gunicorn_app", data_dir)) as server:
        yield server


def test_one_line_in_the_log_says_so(strange: Server) -> None:
    (line,) = (line for line in strange.log.splitlines() if "[WARNING]" in line)
    assert line.endswith(
        "This gunicorn lacks gunicorn.http.unreader.SocketUnreader.take_buffered, "
        "gunicorn.http.wsgi.Response: it is slower than it could be"
    )


def test_uploads_and_downloads(strange: Server) -> None:
    client, data = strange.client, content(2_000_000)
    path = client.create(len(data))
    with client.connect() as connection:
        for start in range(0, len(data), 500_000):
            block = data[start : start + 500_000]
            headers = patch_headers(start, len(block), Upload_Checksum=sha1(block))
            if start % 1_000_000:
                headers = {**patch_headers(start), "Transfer-Encoding": "chunked"}
                block = chunk(block[:9]) + chunk(block[9:]) + chunk(b"")
            head = connection.head("PATCH", path, headers)
            connection.send(head + block + connection.head("HEAD", path, TUS))
            for status in (204, 200):
                answer = connection.read()
                assert (answer.status, answer.offset) == (status, start + 500_000)
        connection.send_head("GET", path, {})
        assert connection.read().body == data
        connection.send_head("GET", path, {"Range": "bytes=5-9"})
        assert connection.read().body == data[5:10]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_what_arrived_is_kept(strange: Server, chunked: bool) -> None:
    client, data = strange.client, content(1_000_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, None if chunked else len(data)) as connection:
        connection.send(chunk(data[:600_000]) if chunked else data[:600_000])
    # gunicorn's own reading loses the last piece, of which it did not get all.
    wait_until(lambda: strange.stored(path) >= 500_000, "bytes on disk")
    offset = client.offset(path)
    assert strange.file(path).read_bytes() == data[:offset]
    client.finish(path, data)
    assert client.get(path).body == data


@pytest.mark.parametrize("size", [100, 100_000, 10_000_000])
def test_refused_bodies(strange: Server, size: int) -> None:
    path = strange.client.create(10**9)
    with strange.client.connect() as connection:
        connection.send_head("PATCH", path, patch_headers(5, size))
        connection.send(bytes(size))
        answer = connection.read()
        assert (answer.status, answer.offset) == (409, 0)
        assert answer.closes == (size > 1_000_000)
        if not answer.closes:
            assert connection.request("HEAD", path, TUS).offset == 0
