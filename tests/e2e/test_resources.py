"""What an upload may take of the host: little memory, and of the disk what there is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from e2e.client import BYTES, MB, TUS, Connection, chunk, content, patch_headers, sha1
from e2e.conftest import SERVE, Serve, Server, app_server, running

#: What the workers together may grow by, whatever the size of a body.
ALLOWANCE = 40 * MB


def send_body(connection: Connection, size: int, *, chunked: bool) -> None:
    block = content(MB)
    for _ in range(size // MB):
        connection.send(chunk(block) if chunked else block)
    if chunked:
        connection.send(chunk(b""))


def exercise(server: Server, size: int) -> int:
    """Send bodies of `size` in every way, and download; returns the highest memory."""
    client = server.client
    checksum = sha1(content(MB) * (size // MB))
    for headers in ({}, {"Upload_Checksum": checksum}, {"Trailer": "Upload-Checksum"}):
        chunked = "Trailer" in headers
        path = client.create(size)
        with client.start_patch(path, 0, None if chunked else size, **headers) as connection:
            if chunked:
                send_body(connection, size, chunked=True)
                # The end of the body without its checksum is a refusal of the last chunk.
                assert connection.read().status == 400
                continue
            send_body(connection, size, chunked=False)
            assert connection.read().offset == size
        with client.connect() as connection:
            connection.send_head("GET", path, {})
            assert connection.count_body() == size
    path = client.create(size)
    with client.start_patch(path, 0, None) as connection:
        send_body(connection, size, chunked=True)
        assert connection.read().offset == size
    # Two halves, so that as much is copied when they become one.
    parts = [client.create(size // 2, Upload_Concat="partial") for _ in range(2)]
    for part in parts:
        with client.start_patch(part, 0, size // 2) as connection:
            send_body(connection, size // 2, chunked=False)
            assert connection.read().status == 204
    client.create_final(parts)
    return server.highest_memory()


def test_memory_does_not_grow_with_a_body(serve: Serve) -> None:
    server = serve()
    for _ in range(8):  # so that both workers have done all of it once
        small = exercise(server, 2 * MB)
    large = exercise(server, 300 * MB)
    grown = large - small
    print(f"two workers: {small / MB:.0f} MB, {grown / MB:+.1f} MB with bodies of 300 MB")
    assert grown < ALLOWANCE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        reason = done.stderr.strip()
    except FileNotFoundError as error:
        reason = str(error)
    if not os.path.ismount(directory):
        assert not os.environ.get("CI"), f"cannot mount a small file system: {reason}"
        pytest.skip(f"cannot mount a small file system: {reason}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def cramped(small_disk: Path) -> Iterator[Server]:
    data_dir = small_disk / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "2", "--min-free-disk", "0"]
    with running(Server(command, data_dir)) as server:
        yield server


def occupy(disk: Path, leave: int) -> Path:
    """Fill a disk up to a rest."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while (left := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave) > 0:
            with suppress(OSError):  # the server writes, too
                file.write(bytes(left))
    return ballast


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_full_disk_keeps_what_fitted(cramped: Server, small_disk: Path, chunked: bool) -> None:
    client, data = cramped.client, content(5_000_000)
    path = client.create(len(data))
    assert client.patch(path, 0, data[:500_000]).status == 204
    ballast = occupy(small_disk, leave=2 * MB)
    with client.start_patch(path, 500_000, None if chunked else 4_500_000) as connection:
        rest = data[500_000:]
        connection.send(chunk(rest) + chunk(b"") if chunked else rest)
        answer = connection.read()
    assert answer.status == 507
    assert int(answer.headers["retry-after"]) > 0
    offset = client.offset(path)
    assert 500_000 < offset == cramped.stored(path) < len(data)
    assert cramped.file(path).read_bytes() == data[:offset]
    assert client.patch(path, offset, data[offset:]).status == 507
    cramped.restart()
    assert cramped.client.offset(path) >= offset
    ballast.unlink()
    cramped.client.finish(path, data)
    assert cramped.client.get(path).body == data


def test_a_full_disk_takes_back_what_was_not_verified(cramped: Server, small_disk: Path) -> None:
    client, data = cramped.client, content(5_000_000)
    path = client.create(len(data))
    assert client.patch(path, 0, data[:500_000]).status == 204
    ballast = occupy(small_disk, leave=2 * MB)
    rest = data[500_000:]
    assert client.patch(path, 500_000, rest, Upload_Checksum=sha1(rest)).status == 507
    assert client.offset(path) == 500_000
    ballast.unlink()
    answer = client.patch(path, 500_000, rest, Upload_Checksum=sha1(rest))
    assert (answer.status, answer.offset) == (204, len(data))
    assert client.get(path).body == data


def test_a_full_disk_leaves_nothing_to_the_next_upload(small_disk: Path) -> None:
    """What went half-way into the file belongs to no other one of the same worker."""
    command = [*SERVE, "--data-dir", str(small_disk), "--workers", "1", "--min-free-disk", "0"]
    data, next_data = content(5_000_000), content(1_500_000, seed=2)
    with running(Server(command, small_disk)) as server:
        client = server.client
        for leave in (1_000_000, 1_234_567, 3_000_000):
            path = client.create(len(data))
            ballast = occupy(small_disk, leave=leave)
            assert client.patch(path, 0, data).status == 507
            assert server.file(path).read_bytes() == data[: client.offset(path)]
            ballast.unlink()
            next_path = client.create(len(next_data))
            client.finish(next_path, next_data)
            assert server.file(next_path).read_bytes() == next_data
            client.finish(path, data)
            assert server.file(path).read_bytes() == data
            for used in (path, next_path):
                assert client.request("DELETE", used, TUS).status == 204


def test_nothing_fits_any_more(cramped: Server, small_disk: Path) -> None:
    client, data, more = cramped.client, content(1_000_000), content(3_000_000)
    finished, started = client.create(len(more)), client.create(len(data))
    client.finish(finished, more)
    assert client.patch(started, 0, data[:1000]).status == 204
    ballast = occupy(small_disk, leave=0)
    assert client.request("POST", "/files/", {**TUS, "Upload-Length": 10}).status == 507
    headers = {**BYTES, "Upload-Length": 10}
    assert client.request("POST", "/files/", headers, b"1234").status == 507
    assert client.get(finished).body == more
    offset = client.offset(started)
    assert offset == cramped.stored(started)
    with client.connect() as connection:
        answer = connection.request("PATCH", started, patch_headers(offset), data[offset:])
        assert answer.status == 507
    # Somebody must be able to make room.
    assert client.request("DELETE", finished, TUS).status == 204
    client.finish(started, data)
    ballast.unlink()
    assert client.get(started).body == data


def test_final_upload_on_a_full_disk(cramped: Server, small_disk: Path) -> None:
    client, data = cramped.client, content(2_000_000)
    parts = [client.create(len(data), Upload_Concat="partial") for _ in range(2)]
    for part in parts:
        client.finish(part, data)
    ballast = occupy(small_disk, leave=3 * MB)
    concat = "final;" + " ".join(parts)
    refused = client.request("POST", "/files/", {**TUS, "Upload-Concat": concat})
    assert refused.status == 507
    ballast.unlink()
    final = client.create_final(parts)
    assert client.offset(final) == 4_000_000
    assert client.get(final).body == data * 2


def test_connections_without_a_request_are_closed(tmp_path: Path) -> None:
    """Bodies have a timeout of their own."""
    data = content(MB)
    with (
        running(app_server("counting_app", tmp_path / "data", "--keep-alive", "1")) as server,
        server.client.connect() as fresh,
        server.client.connect() as slow,
        server.client.connect() as used,
        server.client.start_patch(server.client.create(MB), 0, MB) as busy,
    ):
        slow.send(b"OPTIONS /files/ HTTP/1.1\r\nHo")
        assert used.request("OPTIONS", "/files/", {}).status == 204
        busy.send(data[:1000])
        for connection in (fresh, slow, used):
            assert connection.is_closed()
        busy.send(data[1000:])
        assert busy.read().offset == MB
