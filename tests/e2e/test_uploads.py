"""Whole uploads over the wire: large ones, every extension, and parts on several workers."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tusclient.client import TusClient

from e2e.client import (
    BYTES,
    MB,
    TUS,
    Client,
    chunk,
    content,
    patch_headers,
    path_of,
    sha1,
    sha256_of,
    wait_until,
)
from e2e.conftest import Serve, Server


def test_200_mb_through_tuspy(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(content(200 * MB))
    expected = sha256_of(file)
    client = server.client
    tuspy = TusClient(f"http://{client.origin.host}/files/")
    with file.open("rb") as stream:
        uploader = tuspy.uploader(
            file_stream=stream,
            chunk_size=64 * MB,
            metadata={"filename": "größe.bin", "empty": ""},
        )
        uploader.upload()
    path = uploader.url.removeprefix(f"http://{client.origin.host}")
    assert client.offset(path) == 200 * MB
    assert sha256_of(server.file(path)) == expected
    response = client.get(path)
    assert response.status == 200
    assert hashlib.sha256(response.body).hexdigest() == expected


def test_tuspy_resumes_with_checksums(client: Client) -> None:
    data = content(3 * MB)
    tuspy = TusClient(f"http://{client.origin.host}/files/")
    first = tuspy.uploader(file_stream=io.BytesIO(data), chunk_size=MB, upload_checksum=True)
    first.upload_chunk()
    second = tuspy.uploader(
        file_stream=io.BytesIO(data), url=first.url, chunk_size=MB, upload_checksum=True
    )
    assert second.offset == MB
    second.upload()
    path = first.url.removeprefix(f"http://{client.origin.host}")
    assert client.get(path).body == data


def test_creation_with_upload(client: Client) -> None:
    data = content(100_000)
    response = client.request(
        "POST", "/files/", {**BYTES, "Upload-Length": len(data)}, data[:40_000]
    )
    assert (response.status, response.offset) == (201, 40_000)
    path = path_of(response)
    client.finish(path, data)
    assert client.get(path).body == data


def test_creation_with_the_whole_upload(client: Client) -> None:
    data = content(100_000)
    response = client.request("POST", "/files/", {**BYTES, "Upload-Length": len(data)}, data)
    assert (response.status, response.offset) == (201, len(data))
    assert client.get(path_of(response)).body == data


def test_creation_with_upload_in_chunks(client: Client) -> None:
    data = content(100_000)
    with client.connect() as connection:
        headers = {**BYTES, "Upload-Length": len(data), "Transfer-Encoding": "chunked"}
        connection.send_head("POST", "/files/", headers)
        for start in range(0, len(data), 7_777):
            connection.send(chunk(data[start : start + 7_777]))
        connection.send(chunk(b""))
        response = connection.read()
        assert (response.status, response.offset) == (201, len(data))
        # The connection is where the next request begins.
        assert connection.request("HEAD", path_of(response), TUS).offset == len(data)
    assert client.get(path_of(response)).body == data


def test_deferred_length(client: Client) -> None:
    data = content(50_000)
    path = client.create(None)
    assert client.head(path).headers["upload-defer-length"] == "1"
    assert client.patch(path, 0, data[:20_000]).status == 204
    assert client.patch(path, 20_000, data[20_000:], Upload_Length="50000").status == 204
    head = client.head(path)
    assert (head.offset, head.headers["upload-length"]) == (50_000, "50000")
    assert "upload-defer-length" not in head.headers
    assert client.get(path).body == data


def test_parts_on_several_workers_become_one(server: Server) -> None:
    client = server.client
    parts = [content(300_000, seed) for seed in range(8)]
    paths = [client.create(300_000, Upload_Concat="partial") for _ in parts]
    workers = set()

    def upload(path: str, data: bytes) -> int:
        with client.connect() as connection:
            for start in range(0, len(data), 100_000):
                block = data[start : start + 100_000]
                response = connection.request("PATCH", path, patch_headers(start), block)
                assert response.status == 204
            workers.add(server.worker_of(connection))
        return response.offset

    # Connections go to whichever worker is first: some rounds make sure that both were.
    for _ in range(10):
        with ThreadPoolExecutor(len(parts)) as pool:
            assert set(pool.map(upload, paths, parts)) == {300_000}
        if len(workers) == 2:
            break
        paths = [client.create(300_000, Upload_Concat="partial") for _ in parts]
    assert len(workers) == 2
    path = client.create_final(paths)
    head = client.head(path)
    assert (head.status, head.offset) == (200, 2_400_000)
    assert client.get(path).body == b"".join(parts)


def test_final_upload_of_unfinished_parts(client: Client) -> None:
    parts = [content(200_000, seed) for seed in range(4)]
    paths = [client.create(200_000, Upload_Concat="partial") for _ in parts]
    path = client.create_final(paths)
    head = client.head(path)
    assert head.status == 200
    assert "upload-offset" not in head.headers
    assert client.get(path).status == 404
    with ThreadPoolExecutor(len(parts)) as pool:
        answers = list(pool.map(client.patch, paths, [0] * len(parts), parts))
    assert [answer.status for answer in answers] == [204] * len(parts)
    # No HEAD in between: the last part's PATCH makes it readable.
    assert client.get(path).body == b"".join(parts)
    assert client.patch(path, 800_000, b"more").status == 403


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_checksum_in_a_trailer(client: Client, size: int) -> None:
    data = content(size)
    path = client.create(size + 10)
    with client.start_patch(path, 0, None, Trailer="Upload-Checksum") as connection:
        for start in range(0, size, 50_001):
            connection.send(chunk(data[start : start + 50_001]))
        connection.send(b"0\r\nUpload-Checksum: " + sha1(data).encode() + b"\r\n\r\n")
        assert (connection.read().status, client.offset(path)) == (204, size)
        # Still the same connection, with a checksum that is wrong.
        headers = {**patch_headers(size), "Transfer-Encoding": "chunked"}
        connection.send_head("PATCH", path, {**headers, "Trailer": "Upload-Checksum"})
        connection.send(chunk(b"0123456789"))
        connection.send(b"0\r\nUpload-Checksum: " + sha1(b"else").encode() + b"\r\n\r\n")
        assert connection.read().status == 460
    assert client.offset(path) == size
    client.finish(path, data + b"0123456789")
    assert client.get(path).body == data + b"0123456789"


def test_checksum_in_a_header(client: Client) -> None:
    data = content(1_000_000)
    path = client.create(len(data))
    wrong = client.patch(path, 0, data[:500_000], Upload_Checksum=sha1(b"else"))
    assert wrong.status == 460
    assert client.offset(path) == 0
    right = client.patch(path, 0, data[:500_000], Upload_Checksum=sha1(data[:500_000]))
    assert (right.status, right.offset) == (204, 500_000)
    client.finish(path, data)
    assert client.get(path).body == data


def test_many_downloads_at_once(client: Client) -> None:
    data = content(5 * MB)
    path = client.create(len(data))
    client.finish(path, data)
    with ThreadPoolExecutor(20) as pool:
        bodies = list(pool.map(lambda _: client.get(path).body, range(20)))
    assert all(body == data for body in bodies)


def test_ranges(client: Client) -> None:
    data = content(1_000_000)
    path = client.create(len(data))
    client.finish(path, data)
    with client.connect() as connection:
        for wanted, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=1000-1999", 1000, 2000),
            ("bytes=999990-", 999_990, 1_000_000),
            ("bytes=-7", 999_993, 1_000_000),
            ("bytes=500000-9999999", 500_000, 1_000_000),
        ):
            response = connection.request("GET", path, {"Range": wanted})
            assert (response.status, response.body) == (206, data[start:stop])
            assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/1000000"
        refused = connection.request("GET", path, {"Range": "bytes=1000000-"})
        assert refused.status == 416
        assert refused.headers["content-range"] == "bytes */1000000"
        whole = connection.request("GET", path, {})
        tag = {"Range": "bytes=5-9", "If-Range": whole.headers["etag"]}
        assert connection.request("GET", path, tag).body == data[5:10]
        assert connection.request("GET", path, {**tag, "If-Range": '"x"'}).body == data


def test_downloads_do_not_wait_for_a_patch(serve: Serve) -> None:
    server = serve("--download-unfinished")
    client, data = server.client, content(1_000_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, len(data), data[:600_000]) as upload:
        wait_until(lambda: server.stored(path) == 600_000, "bytes on disk")
        with ThreadPoolExecutor(20) as pool:
            bodies = list(pool.map(lambda _: client.get(path).body, range(20)))
        assert all(body == data[:600_000] for body in bodies)
        upload.send(data[600_000:])
        assert upload.read().status == 204
    assert client.get(path).body == data


@pytest.mark.parametrize("how", ["close", "reset"])
def test_downloads_that_break_off(client: Client, how: str) -> None:
    data = content(20 * MB)
    path = client.create(len(data))
    client.finish(path, data)
    for _ in range(5):
        with client.connect() as connection:
            connection.send_head("GET", path, {})
            connection.wait_for_bytes()
            getattr(connection, how)()
    assert client.get(path).body == data


def test_a_download_outlives_its_upload(client: Client) -> None:
    data = content(20 * MB)
    path = client.create(len(data))
    client.finish(path, data)
    with client.connect() as connection:
        connection.send_head("GET", path, {})
        connection.wait_for_bytes()
        assert client.request("DELETE", path, TUS).status == 204
        assert connection.read().body == data
    assert client.get(path).status == 410
