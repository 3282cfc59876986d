"""A limit for all uploads together, among workers and hosts that race and die."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import databases
import pytest
import redis_service

from e2e.client import BYTES, TUS, Client, Response, content, path_of, wait_until
from e2e.conftest import Serve

SIZE = 100_000
ROOM_FOR = 10
CLIENTS = 16
LIMIT = ("--limited-max-total-size", str(SIZE * ROOM_FOR))
DATA = content(SIZE)


@pytest.fixture(params=["sqlite", "files", "redis", *databases.SERVERS])
def hosts(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Iterator[list[Client]]:
    """Clients of two servers of two workers each, with the same uploads."""
    with ExitStack() as stack:
        flags: tuple[str, ...] = ()
        if request.param == "files":
            flags = ("--info-storage", "file-info-storage")
        elif request.param == "redis":
            settings = stack.enter_context(redis_service.own_keys())
            flags = ("--info-storage", "redis-info-storage", "--info-db-dsn", redis_service.url())
            flags += ("--redis-prefix", settings.redis_prefix)
        elif request.param in databases.SERVERS:
            dsn = stack.enter_context(databases.SERVERS[request.param]())
            flags = ("--info-db-dsn", dsn)
        is_shared = request.param not in ("sqlite", "files")
        clients = []
        for number in "12":
            own = ("--runtime-dir", str(tmp_path / f"host{number}")) if is_shared else ()
            clients.append(serve(*LIMIT, *flags, *own).client)
        yield clients


def post(client: Client, size: int = SIZE, body: bytes = b"") -> Response:
    headers = {**(BYTES if body else TUS), "Upload-Length": size}
    return client.request("POST", client.url, headers, body)


def race(hosts: list[Client], body: bytes) -> list[Response]:
    """Create uploads at the same time, and return the answers."""
    ready = threading.Barrier(CLIENTS)

    def create(number: int) -> Response:
        ready.wait()
        return post(hosts[number % len(hosts)], body=body)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(create, range(CLIENTS)))


def assert_full(response: Response) -> None:
    assert response.status == 507, response
    assert int(response.headers["retry-after"]) > 0
    assert str(SIZE * ROOM_FOR).encode() in response.body


@pytest.mark.parametrize("body", [b"", DATA], ids=["empty", "with bytes"])
def test_racing_clients_never_get_more_than_there_is(hosts: list[Client], body: bytes) -> None:
    answers = race(hosts, body)
    made = [path_of(answer) for answer in answers if answer.status == 201]
    assert len(made) == ROOM_FOR
    for answer in answers:
        if answer.status != 201:
            assert_full(answer)
    for path in made[:3]:
        assert hosts[0].request("DELETE", path, TUS).status == 204
    again = race(hosts, body)
    assert [answer.status for answer in again].count(201) == 3
    for path in made[3:]:
        if not body:
            hosts[1].finish(path, DATA)
        assert hosts[0].get(path).body == DATA


def test_racing_clients_evict_no_more_than_they_must(serve: Serve) -> None:
    hosts = [serve(*LIMIT, "--limited-evict").client for _ in "12"]
    old = [path_of(post(hosts[0], body=DATA)) for _ in range(ROOM_FOR)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(post, hosts * 2))
    assert [answer.status for answer in answers] == [201] * 4
    statuses = [hosts[1].head(path).status for path in old]
    assert statuses == [410] * 4 + [200] * (ROOM_FOR - 4)


def test_a_kill_frees_nothing_and_counts_nothing_twice(serve: Serve) -> None:
    server = serve(*LIMIT)
    promised = server.client.create(6 * SIZE)
    data = content(6 * SIZE)
    with server.client.start_patch(promised, 0, len(data), data[:SIZE]):
        wait_until(lambda: server.stored(promised) > 0, "bytes on disk")
        server.restart()
    client = server.client
    assert_full(post(client, 5 * SIZE))
    assert post(client, 4 * SIZE).status == 201
    client.finish(promised, data)
    assert_full(post(client, 1))


def test_a_kill_in_a_creation_keeps_what_it_promised(serve: Serve) -> None:
    server = serve(*LIMIT)
    with server.client.connect() as connection:
        headers = {**BYTES, "Upload-Length": 6 * SIZE, "Content-Length": 6 * SIZE}
        connection.send(connection.head("POST", server.client.url, headers) + DATA)
        wait_until(lambda: any(f.stat().st_size for f in uploads(server.data_dir)), "bytes")
        server.restart()
    assert_full(post(server.client, 5 * SIZE))
    assert post(server.client, 4 * SIZE).status == 201


def uploads(data_dir: Path) -> list[Path]:
    return [path for path in data_dir.iterdir() if path.is_file()]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_kill_in_an_upload_of_unknown_length(serve: Serve, chunked: bool) -> None:
    server = serve(*LIMIT)
    deferred, data = server.client.create(None), content(6 * SIZE)
    length = None if chunked else len(data)
    with server.client.start_patch(deferred, 0, length, data[:SIZE]):
        wait_until(lambda: server.stored(deferred) > 0, "bytes on disk")
        server.restart()
    client = server.client
    assert_full(post(client, 5 * SIZE))
    offset = client.offset(deferred)
    answer = client.patch(deferred, offset, data[offset:], Upload_Length=str(len(data)))
    assert answer.offset == len(data)
    assert client.get(deferred).body == data
    assert_full(post(client, 5 * SIZE))
    assert post(client, 4 * SIZE).status == 201


def test_racing_bodies_of_unknown_length_never_get_more_than_there_is(serve: Serve) -> None:
    hosts = [serve(*LIMIT).client for _ in "12"]
    paths = [hosts[0].create(None) for _ in range(CLIENTS)]
    ready = threading.Barrier(CLIENTS)

    def append(number: int) -> Response:
        ready.wait()
        return hosts[number % 2].patch(paths[number], 0, DATA)

    with ThreadPoolExecutor(CLIENTS) as pool:
        statuses = [answer.status for answer in pool.map(append, range(CLIENTS))]
    assert (statuses.count(204), statuses.count(507)) == (ROOM_FOR, CLIENTS - ROOM_FOR)
