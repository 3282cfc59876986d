"""Clients that break off or fall silent: what had arrived stays."""

from __future__ import annotations

import random

import pytest

from e2e.client import Connection, chunk, content, wait_until
from e2e.conftest import Serve, Server

SIZE = 3_000_000


def send(connection: Connection, data: bytes, *, chunked: bool) -> None:
    """Send bytes of a body, a chunked one in chunks of any length."""
    if not chunked:
        connection.send(data)
        return
    while data:
        n = random.randint(1, 100_000)
        connection.send(chunk(data[:n]))
        data = data[n:]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("sent", [0, 1, 5_000, 1_234_567, SIZE - 1])
def test_a_fin_keeps_all_that_was_sent(server: Server, chunked: bool, sent: int) -> None:
    client, data = server.client, content(SIZE)
    path = client.create(SIZE)
    with client.start_patch(path, 0, None if chunked else SIZE) as connection:
        send(connection, data[:sent], chunked=chunked)
    # Nobody asks before: a HEAD would end the PATCH with what it has read so far.
    wait_until(lambda: server.stored(path) == sent, "all bytes")
    assert client.offset(path) == sent
    client.finish(path, data)
    assert client.get(path).body == data


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_half_closed_connection_hears_how_it_ended(server: Server, chunked: bool) -> None:
    client, data = server.client, content(SIZE)
    path = client.create(SIZE)
    with client.start_patch(path, 0, None if chunked else SIZE) as connection:
        send(connection, data[:1_000_000], chunked=chunked)
        connection.half_close()
        answer = connection.read()
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert connection.is_closed()
    assert client.offset(path) == 1_000_000


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_reset_keeps_what_had_arrived(server: Server, chunked: bool) -> None:
    client, data = server.client, content(SIZE)
    path, sent = client.create(SIZE), 0
    while sent < SIZE:
        n = min(random.randint(1, 1_500_000), SIZE - sent)
        with client.start_patch(path, sent, None if chunked else SIZE - sent) as connection:
            send(connection, data[sent : sent + n], chunked=chunked)
            sent += n
            wait_until(lambda expected=sent: server.stored(path) == expected, "all bytes")
            connection.reset()
        assert client.offset(path) == sent
    assert client.get(path).body == data


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_aborts_at_any_moment(server: Server, chunked: bool) -> None:
    """Nobody waits for anything: what a HEAD tells is a prefix, and it never goes down."""
    client, data = server.client, content(SIZE)
    path, reached = client.create(SIZE), 0
    for _ in range(40):
        offset = client.offset(path)
        assert offset >= reached
        reached = offset
        if offset == SIZE:
            break
        n = random.randint(0, min(400_000, SIZE - offset))
        with client.start_patch(path, offset, None if chunked else SIZE - offset) as connection:
            send(connection, data[offset : offset + n], chunked=chunked)
            random.choice([connection.reset, connection.close])()
    # The last of them may still be on its way, and arrive after a HEAD.
    offset = client.offset(path)
    while (answer := client.patch(path, offset, data[offset:])).status == 409:
        assert answer.offset > offset
        offset = answer.offset
    assert (answer.status, answer.offset) == (204, SIZE)
    assert client.get(path).body == data


def test_broken_chunks_keep_what_came_before(server: Server) -> None:
    client, data = server.client, content(500_000)
    path = client.create(SIZE)
    with client.start_patch(path, 0, None) as connection:
        connection.send(chunk(data) + b"nonsense\r\n")
        assert connection.read().status == 400
        assert connection.is_closed()
    assert client.offset(path) == len(data)
    assert server.file(path).read_bytes() == data


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_silent_body_ends_after_network_timeout(serve: Serve, chunked: bool) -> None:
    server = serve("--network-timeout", "1s")
    client, data = server.client, content(SIZE)
    path = client.create(SIZE)
    with client.start_patch(path, 0, None if chunked else SIZE) as connection:
        send(connection, data[:1_000_000], chunked=chunked)
        answer = connection.read()
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert answer.closes
        assert connection.is_closed()
    assert client.offset(path) == 1_000_000
    client.finish(path, data)
    assert client.get(path).body == data


def test_a_slow_body_is_not_a_silent_one(serve: Serve) -> None:
    server = serve("--network-timeout", "2s")
    client, data = server.client, content(16)
    path = client.create(len(data))
    with client.start_patch(path, 0, len(data)) as connection:
        for start in range(0, len(data), 2):
            connection.pause(0.4)
            connection.send(data[start : start + 2])
            wait_until(lambda end=start + 2: server.stored(path) == end, "bytes on disk")
        assert connection.read().status == 204


def test_few_bytes_of_a_silent_body_reach_the_disk(serve: Serve) -> None:
    server = serve("--network-timeout", "10s")
    path = server.client.create(SIZE)
    with server.client.start_patch(path, 0, SIZE) as connection:
        for end in range(100, 400, 100):
            connection.send(bytes(100))
            wait_until(lambda end=end: server.stored(path) == end, "bytes on disk")
