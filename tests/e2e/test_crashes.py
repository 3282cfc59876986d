"""SIGKILL in mid-body: acknowledged bytes survive, unverified ones do not."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator

import databases
import pytest

from e2e.client import MB, Connection, content, sha1, sha256_of, wait_until
from e2e.conftest import Serve, Server


def send_and_kill(server: Server, path: str, data: bytes, acknowledged: int, step: int) -> int:
    """Send requests until a random moment, then kill the server.

    :param step: about how many bytes to send.
    :returns: the highest offset that the server has told.
    """
    client = server.client
    while random.random() < 0.5:  # some requests that come to their end
        stop = acknowledged + random.randint(0, step // 3)
        answer = client.patch(path, acknowledged, data[acknowledged:stop])
        assert (answer.status, answer.offset) == (204, min(stop, len(data)))
        acknowledged = answer.offset
    chunked = random.random() < 0.5
    length = len(data) - acknowledged
    part = data[acknowledged : acknowledged + random.randint(0, step)]
    with client.start_patch(path, acknowledged, None if chunked else length, part):
        # The socket's buffers take megabytes before the server has read them: it is
        # anywhere in between when it is killed.
        seen = acknowledged + random.choice([0, random.randint(0, len(part))])
        wait_until(lambda: server.stored(path) >= seen, "bytes on disk")
        server.kill()
    return acknowledged


def upload_with_kills(server: Server, size: int, kills: int) -> None:
    data = content(size)
    path, acknowledged, reached = server.client.create(size), 0, []
    for _ in range(kills):
        acknowledged = send_and_kill(server, path, data, acknowledged, size // kills)
        stored = server.stored(path)
        server.start()
        offset = server.client.offset(path)
        assert acknowledged <= offset <= stored
        reached.append(offset)
        acknowledged = offset
    print(f"{kills} kills, at {[round(offset / MB, 1) for offset in reached]} MB")
    assert acknowledged < size, "the kills came too late"
    server.client.finish(path, data)
    assert sha256_of(server.file(path)) == hashlib.sha256(data).hexdigest()
    assert server.client.get(path).body == data


def test_kills_in_one_upload(serve: Serve) -> None:
    upload_with_kills(serve(), 60 * MB, 12)


@pytest.mark.slow
def test_many_kills_in_a_large_upload(serve: Serve) -> None:
    upload_with_kills(serve(), 300 * MB, 30)


def test_kills_with_force_fsync(serve: Serve) -> None:
    upload_with_kills(serve("--force-fsync"), 10 * MB, 5)


def test_kills_with_info_files(serve: Serve) -> None:
    upload_with_kills(serve("--info-storage", "file-info-storage"), 10 * MB, 5)


@pytest.fixture(params=databases.SERVERS)
def dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    with databases.SERVERS[request.param]() as dsn:
        yield dsn


def test_kills_with_records_on_a_server(dsn: str, serve: Serve) -> None:
    upload_with_kills(serve("--info-db-dsn", dsn, "--pool-size", "3"), 10 * MB, 5)


def start_checked(server: Server, path: str, offset: int, data: bytes) -> Connection:
    return server.client.start_patch(path, offset, len(data), Upload_Checksum=sha1(data))


@pytest.mark.parametrize("flags", [(), ("--force-fsync",)], ids=["plain", "force-fsync"])
def test_a_kill_takes_back_what_was_not_verified(serve: Serve, flags: tuple[str, ...]) -> None:
    server, size, step = serve(*flags), 4_000_000, 1_000_000
    data = content(size)
    path = server.client.create(size)
    for offset in range(0, size, step):
        block = data[offset : offset + step]
        with start_checked(server, path, offset, block) as connection:
            sent = random.randint(1, step - 1)
            connection.send(block[:sent])
            wait_until(lambda end=offset + sent: server.stored(path) == end, "bytes on disk")
            server.kill()
        server.start()
        assert server.client.offset(path) == offset
        answer = server.client.patch(path, offset, block, Upload_Checksum=sha1(block))
        assert (answer.status, answer.offset) == (204, offset + step)
    assert server.client.get(path).body == data


def test_a_kill_around_the_verification(serve: Serve) -> None:
    """All bytes are sent, the kill strikes before, within or after: all of them or none."""
    server, step, rounds = serve(), 300_000, 8
    data = content(step * rounds)
    path, outcomes = server.client.create(len(data)), []
    for offset in range(0, len(data), step):
        block = data[offset : offset + step]
        with start_checked(server, path, offset, block) as connection:
            connection.send(block)
            moment = random.choice(["at once", "stored", "answered"])
            if moment == "stored":
                wait_until(lambda: server.stored(path) > offset, "bytes on disk")  # noqa: B023
            elif moment == "answered":
                assert connection.read().status == 204
            server.kill()
        server.start()
        reached = server.client.offset(path)
        assert reached in (offset, offset + step)
        assert reached > offset or moment != "answered"
        outcomes.append(reached > offset)
        if reached == offset:
            answer = server.client.patch(path, offset, block, Upload_Checksum=sha1(block))
            assert answer.status == 204
    print(f"verified before the kill: {sum(outcomes)} of {rounds}")
    assert server.client.get(path).body == data


def test_a_wrong_chunk_after_a_kill_is_taken_back_too(serve: Serve) -> None:
    server, data = serve(), content(200_000)
    path = server.client.create(len(data))
    assert server.client.patch(path, 0, data[:100_000]).status == 204
    with start_checked(server, path, 100_000, data[100_000:]) as connection:
        connection.send(data[100_000:150_000])
        wait_until(lambda: server.stored(path) == 150_000, "bytes on disk")
        server.kill()
    server.start()
    # The next writer brings no checksum: it begins where the verified bytes end.
    answer = server.client.patch(path, 100_000, data[100_000:120_000])
    assert (answer.status, answer.offset) == (204, 120_000)
    assert server.client.offset(path) == server.stored(path) == 120_000
    server.client.finish(path, data)
    assert server.client.get(path).body == data


def test_one_worker_dies(serve: Serve) -> None:
    """Its locks are free at once, and the other worker goes on."""
    server, data = serve(), content(3_000_000)
    path = server.client.create(len(data))
    for offset in range(0, 3_000_000, 500_000):
        assert server.client.offset(path) == offset
        part = data[offset : offset + 500_000]
        with server.client.start_patch(path, offset, len(data) - offset, part) as connection:
            wait_until(lambda end=offset + 500_000: server.stored(path) == end, "bytes on disk")
            if offset + 500_000 < len(data):
                os.kill(server.worker_of(connection), signal.SIGKILL)
                wait_until(connection.is_closed, "the end")
            else:
                assert connection.read().status == 204
    assert server.client.get(path).body == data


def test_creations_survive_a_kill(serve: Serve) -> None:
    server = serve()
    for _ in range(5):
        paths = [server.client.create(10, Upload_Metadata="key dmFsdWU=") for _ in range(20)]
        server.kill()
        server.start()
        for path in paths:
            head = server.client.head(path)
            assert (head.status, head.offset) == (200, 0)
            assert head.headers["upload-metadata"] == "key dmFsdWU="
