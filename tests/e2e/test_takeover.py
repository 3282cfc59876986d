"""Several requests for one upload: one writes, and a dead connection does not block the next.

The servers have the default ``lock_timeout`` (20 s) and ``network_timeout`` (60 s): an
answer that comes soon did not wait for either of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import pytest

from e2e.client import TUS, Connection, Response, chunk, content, patch_headers, wait_until
from e2e.conftest import Server
from tuswsgi.lockers.lock_files import is_locked

#: Far below both timeouts, and far above what a busy machine needs.
SOON = 5.0

Connections = tuple[Connection, Connection]


@contextmanager
def two_connections(
    server: Server, *, same_worker: bool
) -> Iterator[tuple[Connection, Connection]]:
    """Open two connections, accepted by one worker or by two."""
    opened: list[tuple[Connection, int]] = []
    try:
        while True:
            assert len(opened) < 300, "the workers do not share the connections"
            connection = server.client.connect()
            connection.request("OPTIONS", "/files/", {})
            worker = server.worker_of(connection)
            opened.append((connection, worker))
            for other, its_worker in opened[:-1]:
                if (worker == its_worker) is same_worker:
                    yield other, connection
                    return
    finally:
        for connection, _ in opened:
            connection.close()


def trickle(connection: Connection, data: bytes) -> None:
    while data:
        n = random.randint(1, 200_000)
        connection.send(data[:n])
        data = data[n:]


@pytest.mark.parametrize("same_worker", [True, False], ids=["one worker", "two workers"])
def test_two_patches_at_one_offset(server: Server, same_worker: bool) -> None:
    client, size, rounds = server.client, 1_000_000_000, 40
    path, expected = client.create(size), b""
    start = Barrier(2)

    def race(connection: Connection, piece: bytes) -> Response:
        head = connection.head("PATCH", path, patch_headers(len(expected), len(piece)))
        start.wait()
        connection.send(head)
        trickle(connection, piece)
        return connection.read()

    outcomes = set()
    for seed in range(rounds):
        # Real clients would send the same bytes; other ones show who wrote what.
        pieces = [content(random.randint(1, 1_500_000), 2 * seed + n) for n in (0, 1)]
        with (
            two_connections(server, same_worker=same_worker) as connections,
            ThreadPoolExecutor(2) as pool,
        ):
            answers = list(pool.map(race, connections, pieces))
        statuses = sorted(answer.status for answer in answers)
        outcomes.add(tuple(statuses))
        offset = client.offset(path)
        kept = server.file(path).read_bytes()
        assert (kept[: len(expected)], len(kept)) == (expected, offset)
        new = kept[len(expected) :]
        if 204 in statuses:
            assert statuses in ([204, 409], [204, 423])
            winner = pieces[[answer.status for answer in answers].index(204)]
            assert new == winner
        else:
            assert statuses == [409, 423]
            displaced = pieces[[answer.status for answer in answers].index(423)]
            assert displaced.startswith(new)
        for answer in answers:
            if answer.status == 423:
                assert "retry-after" in answer.headers
            if answer.status == 409:
                assert answer.offset <= offset
        expected = kept
    print(f"outcomes: {sorted(outcomes)}")


@contextmanager
def hanging(server: Server, connection: Connection, path: str, *, chunked: bool) -> Iterator[int]:
    """Let a PATCH fall silent in mid-body; yields the offset it has reached."""
    offset, data = server.stored(path), content(random.randint(0, 100_000))
    headers = patch_headers(offset, None if chunked else len(data) + 1)
    if chunked:
        headers["Transfer-Encoding"] = "chunked"
    # In one piece, as in Client.start_patch.
    body = chunk(data) if chunked and data else data
    connection.send(connection.head("PATCH", path, headers) + body)
    wait_until(lambda: server.stored(path) == offset + len(data), "bytes on disk")
    # If there are no bytes only the lock tells that the request has come so far.
    locks = server.data_dir / ".tuswsgi" / "locks"
    wait_until(lambda: is_locked(locks, path.rpartition("/")[2]), "the lock")
    yield offset + len(data)
    answer = connection.read()
    assert answer.status == 423
    assert "retry-after" in answer.headers
    assert answer.closes
    assert connection.is_closed()


def timed(request: Callable[[], Response]) -> tuple[Response, float]:
    start = time.monotonic()
    return request(), time.monotonic() - start


@pytest.mark.parametrize("same_worker", [True, False], ids=["one worker", "two workers"])
@pytest.mark.parametrize("method", ["HEAD", "PATCH"])
def test_a_silent_patch_lets_go(server: Server, same_worker: bool, method: str) -> None:
    path, latencies = server.client.create(1_000_000_000), []
    for turn in range(15):
        with two_connections(server, same_worker=same_worker) as (silent, other):
            with hanging(server, silent, path, chunked=turn % 2 == 0) as offset:
                headers, body = (TUS, b"") if method == "HEAD" else (patch_headers(offset), b"x")
                answer, latency = timed(lambda: other.request(method, path, headers, body))  # noqa: B023
            assert answer.status == (200 if method == "HEAD" else 204)
            assert answer.offset == offset + len(body)
            latencies.append(latency)
            resumed = other.request("PATCH", path, patch_headers(answer.offset), b"more")
            assert (resumed.status, resumed.offset) == (204, answer.offset + 4)
    assert max(latencies) < SOON
    place = "the same worker" if same_worker else "another worker"
    print(
        f"{method} takes over from {place}: median {statistics.median(latencies) * 1000:.1f} ms, "
        f"longest {max(latencies) * 1000:.1f} ms"
    )


def test_delete_takes_over(server: Server) -> None:
    path = server.client.create(1_000_000_000)
    with (
        two_connections(server, same_worker=False) as (silent, other),
        hanging(server, silent, path, chunked=False),
    ):
        answer, latency = timed(lambda: other.request("DELETE", path, TUS))
        assert answer.status == 204
    assert latency < SOON
    assert server.client.head(path).status == 410
    assert not server.file(path).exists()


@pytest.mark.parametrize("same_worker", [True, False], ids=["one worker", "two workers"])
def test_a_client_that_never_pauses_lets_go(server: Server, same_worker: bool) -> None:
    block = content(1_000_000)
    path = server.client.create(10_000_000_000)

    def send_until_answered(connection: Connection) -> Response:
        connection.send_head("PATCH", path, patch_headers(0, 10_000_000_000))
        return connection.send_until_answered(block)

    with (
        two_connections(server, same_worker=same_worker) as (sender, other),
        ThreadPoolExecutor(1) as pool,
    ):
        sent = pool.submit(send_until_answered, sender)
        wait_until(lambda: server.stored(path) > 5_000_000, "bytes on disk")
        answer, latency = timed(lambda: other.request("HEAD", path, TUS))
        assert answer.status == 200
        assert answer.offset == server.stored(path) > 5_000_000
        assert sent.result().status == 423
    assert latency < SOON
    assert server.client.request("DELETE", path, TUS).status == 204


def test_a_crowd_that_asks(server: Server) -> None:
    """Whoever asks while many ask gets an answer, and only complete blocks count."""
    client, size = server.client, 2_000_000
    data = content(size)
    path = client.create(size)

    def ask(turn: int) -> int:
        return client.offset(path)

    def resume(turn: int) -> set[int]:
        statuses = set()
        while (offset := client.offset(path)) < size:
            answer = client.patch(path, offset, data[offset : offset + 300_000])
            statuses.add(answer.status)
        return statuses

    with ThreadPoolExecutor(12) as pool:
        resuming = [pool.submit(resume, turn) for turn in range(4)]
        asked = list(pool.map(ask, range(100)))
        statuses = set().union(*(one.result() for one in resuming))
    assert max(asked) <= size
    assert statuses <= {204, 409, 423}
    assert client.get(path).body == data
