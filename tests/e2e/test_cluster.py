"""Several hosts with one store: any request of an upload reaches any server.

The servers share the data directory and the server of records and locks, and nothing else: each
has a runtime directory of its own, so that the kernel's locks do not help.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from private_servers import PrivateMariaDb, PrivatePostgres, PrivateRedis, PrivateServer

from e2e.client import Client, content, sha1, wait_until
from e2e.conftest import SERVE, Server, free_port, running
from e2e.uploader import PASSING, Uploader, report, wait_for_progress

SERVERS = 3
UPLOADS = 60


@dataclass
class Cluster:
    """Some servers, and the one that they share."""

    shared: PrivateServer
    servers: list[Server]

    def any_client(self) -> Client:
        return random.choice(self.servers).client

    def clients(self) -> list[Client]:
        return [server.client for server in self.servers]

    @property
    def flags(self) -> tuple[str, ...]:
        kind = "redis" if isinstance(self.shared, PrivateRedis) else "db"
        return ("--info-storage", f"{kind}-info-storage", "--info-db-dsn", self.shared.dsn)

    def new_server(self, directory: Path) -> Server:
        number, data_dir = len(self.servers), directory / "data"
        command = [
            *(*SERVE, "--data-dir", str(data_dir), "--port", str(free_port())),
            *("--workers", "1", "--runtime-dir", str(directory / f"host{number}")),
            *("--lock-lease", "2", "--download-unfinished", *self.flags),
        ]
        return Server(command, data_dir)


@pytest.fixture(params=[PrivateRedis, PrivatePostgres, PrivateMariaDb])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        shared: PrivateServer = request.param()
        stack.callback(shared.remove)
        cluster = Cluster(shared, [])
        for _ in range(SERVERS):
            cluster.servers.append(stack.enter_context(running(cluster.new_server(tmp_path))))
        yield cluster


def strike(cluster: Cluster) -> str:
    """Do something bad to one of the servers, or to what they share."""
    what = random.choice(["kill a worker", "kill a host", "restart the shared one"])
    if what == "kill a worker":
        random.choice(cluster.servers).kill_worker()
    elif what == "kill a host":
        random.choice(cluster.servers).restart()
    else:
        cluster.shared.restart()
    return what


@pytest.mark.slow
def test_uploads_survive_everything(cluster: Cluster) -> None:
    sizes = [random.choice([0, 1, 5_000, 200_000, 1_000_000, 3_000_000]) for _ in range(UPLOADS)]
    uploaders = [
        Uploader(cluster.any_client, content(size, seed), random.Random(random.random()))
        for seed, size in enumerate(sizes)
    ]
    done: Counter[str] = Counter()
    try:
        with ThreadPoolExecutor(12) as pool:
            uploading = [pool.submit(one.run) for one in uploaders]
            for _ in range(8):
                wait_for_progress(uploaders, uploading, 2_000_000)
                done[strike(cluster)] += 1
            cluster.shared.restart()
            for one in uploading:
                one.result()
    finally:
        report(uploaders, done)
    for client in cluster.clients():
        wait_until(
            lambda client=client: client.head(uploaders[0].path).status == 200, "all servers again"
        )
    for one in uploaders:
        # Thousands of lines of bytes would tell nobody anything.
        body = cluster.any_client().get(one.path).body
        assert sha1(body) == sha1(one.data)


@dataclass
class Writer:
    """Sends bytes that nobody else sends, always to where the upload ends."""

    cluster: Cluster
    path: str
    mark: bytes
    #: Where bytes begin and end that were acknowledged as this one's.
    kept: list[tuple[int, int]] = field(default_factory=list)
    statuses: Counter[object] = field(default_factory=Counter)

    def write_until(self, end: float) -> None:
        while time.monotonic() < end:
            try:
                self._write(self.cluster.any_client())
            except OSError as error:
                self.statuses[type(error).__name__] += 1

    def _write(self, client: Client) -> None:
        head = client.head(self.path)
        self.statuses[f"HEAD {head.status}"] += 1
        if head.status != 200:
            assert head.status in PASSING
            return
        part = self.mark * random.choice([10, 10_000, 300_000])
        answer = client.patch(self.path, head.offset, part)
        self.statuses[answer.status] += 1
        if answer.status == 204:
            self.kept.append((head.offset, answer.offset))
        else:
            assert answer.status in PASSING


@pytest.mark.slow
def test_one_of_many_writers_wins(cluster: Cluster) -> None:
    """Eight clients write at one offset, over and over; each byte is its writer's."""
    path = cluster.any_client().create(2 * 10**9)
    writers = [Writer(cluster, path, bytes([number])) for number in range(1, 9)]
    end = time.monotonic() + 10.0
    with ThreadPoolExecutor(len(writers)) as pool:
        for done in [pool.submit(one.write_until, end) for one in writers]:
            done.result()
    print(f"answers: {dict(sum((one.statuses for one in writers), Counter()))}")
    # It may lie in several files, if a server was so busy that it lost its lock.
    stored = cluster.any_client().get(path).body
    segments = sorted((start, stop, one.mark) for one in writers for start, stop in one.kept)
    assert len({mark for _, _, mark in segments}) > 1, "only one writer was ever lucky"
    reached = 0
    for start, stop, mark in segments:
        assert start >= reached, "two writers had the same bytes acknowledged"
        assert stored[start:stop] == mark * (stop - start), "another writer was in between"
        reached = stop
    # A part that was displaced is the writer's whose answer said so; nothing is torn.
    assert cluster.any_client().offset(path) == len(stored)


def test_takeover_between_hosts(cluster: Cluster) -> None:
    """Another host gets the upload from a connection that says nothing more."""
    first, second, _ = (server.client for server in cluster.servers)
    data = content(1_000_000)
    path, times = first.create(len(data)), []
    for offset in range(0, 500_000, 100_000):
        with first.start_patch(path, offset, len(data) - offset, data[offset : offset + 100_000]):
            wait_until(lambda end=offset + 100_000: cluster.servers[0].stored(path) == end, "bytes")
            began = time.monotonic()
            assert second.offset(path) == offset + 100_000
            times.append(time.monotonic() - began)
    print(f"takeovers: {[f'{1000 * seconds:.0f} ms' for seconds in times]}")
    second.finish(path, data)
    assert first.get(path).body == data


def test_a_dead_host_holds_nothing_for_long(cluster: Cluster) -> None:
    first, second, _ = cluster.servers
    data = content(300_000)
    path = first.client.create(len(data))
    with first.client.start_patch(path, 0, len(data), data[:100_000]):
        wait_until(lambda: first.stored(path) == 100_000, "bytes")
        first.kill()
        assert second.client.offset(path) == 100_000
    second.client.finish(path, data)
    first.start()
    assert first.client.get(path).body == data


def test_the_shared_server_is_away(cluster: Cluster) -> None:
    """What is being received is kept, clients are told to come back, and can."""
    (server, *_), data = cluster.servers, content(300_000)
    path = server.client.create(len(data))
    with server.client.start_patch(path, 0, len(data), data[:100_000]) as connection:
        wait_until(lambda: server.stored(path) == 100_000, "bytes")
        cluster.shared.kill()
        answer = connection.read()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert server.client.head(path).status == 503
    assert os.path.getsize(server.file(path)) == 100_000
    cluster.shared.start()
    wait_until(lambda: server.client.head(path).status == 200, "the shared server's return")
    server.client.finish(path, data)
    assert server.client.get(path).body == data


def test_a_worker_begins_while_the_shared_server_is_away(cluster: Cluster) -> None:
    server, data = cluster.servers[0], content(100_000)
    path = server.client.create(len(data))
    seen = server.log_length
    cluster.shared.kill()
    server.kill_worker()
    server.wait_for("Uploads cannot be served yet", seen)
    assert server.client.head(path).status == 503
    cluster.shared.start()
    wait_until(lambda: server.client.head(path).status == 200, "the shared server's return")
    server.client.finish(path, data)
