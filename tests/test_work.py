"""How much work the server does: counted, since times say little on a busy machine.

The bounds are a quarter above what was counted when they were set, or what the techniques
promise. Who makes the server do more has to say why here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from e2e.client import BYTES, TUS, Connection, patch_headers, sha1, wait_until
from e2e.conftest import Server, app_server, running

KIB, MIB = 1024, 1024 * 1024

SIZE = 64 * MIB

Counts = dict[str, float]


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one worker that counts what it does."""
    data_dir = tmp_path_factory.mktemp("work") / "data"
    with running(app_server("counting_app", data_dir)) as server:
        server.client.finish(server.client.create(100), bytes(100))  # all is loaded now
        yield server


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Such a server that serves metrics, too."""
    data_dir = tmp_path_factory.mktemp("measured") / "data"
    with running(app_server("counting_app", data_dir, metrics="true")) as server:
        yield server


def ask(server: Server, path: str) -> Counts:
    counts: Counts = json.loads(server.client.request("GET", path, {}).body)
    return counts


@contextmanager
def counted(server: Server, per: int = 1) -> Iterator[Counts]:
    """Count the calls that are made in the block, by name."""
    counts: Counts = {}
    ask(server, "/work")
    yield counts
    counts |= {name: number / per for name, number in ask(server, "/work").items()}
    print({name: round(number, 2) for name, number in counts.items()})


def upload(server: Server, size: int, **headers: str) -> Counts:
    """Upload zeros as quickly as they go, and return the calls per MiB."""
    path, block = server.client.create(size), bytes(MIB)
    with (
        counted(server, per=size // MIB) as counts,
        server.client.start_patch(path, 0, size, **headers) as connection,
    ):
        for _ in range(size // MIB):
            connection.send(block)
        assert connection.read().offset == size
    return counts


def trickle(server: Server, size: int) -> Counts:
    """Upload as slowly as networks are, and return the calls per MiB."""
    path, burst = server.client.create(size), bytes(64 * KIB)
    with (
        counted(server, per=size // MIB) as counts,
        server.client.start_patch(path, 0, size) as connection,
    ):
        for _ in range(size // len(burst)):
            connection.send(burst)
            time.sleep(0.005)
        assert connection.read().offset == size
    return counts


def download(server: Server, size: int) -> Counts:
    """Download and return the calls per MiB."""
    path, block = server.client.create(size), bytes(MIB)
    with server.client.start_patch(path, 0, size) as connection:
        for _ in range(size // MIB):
            connection.send(block)
        assert connection.read().status == 204
    with counted(server, per=size // MIB) as counts, server.client.connect() as connection:
        connection.send_head("GET", path, {})
        assert connection.count_body() == size
    return counts


def check(measure: Callable[[], Counts], bounds: Counts) -> None:
    """Check that calls are within bounds, at least once: a pause of the client's costs some."""
    for _ in range(3):
        counts = measure()
        if all(counts.get(name, 0) <= most for name, most in bounds.items()):
            return
    pytest.fail(f"more than {bounds}: {counts}")


def test_an_upload(counting: Server) -> None:
    # A turn of half a MiB: from the socket, to the file, and perhaps to see nothing more.
    check(lambda: upload(counting, SIZE), {"splice": 9, "pwrite": 0.1, "recv_into": 0.1})


def test_an_upload_with_a_checksum(counting: Server) -> None:
    checksum, bounds = sha1(bytes(SIZE)), {"recv_into": 6.0, "pwrite": 6.0}
    check(lambda: upload(counting, SIZE, Upload_Checksum=checksum), bounds)


def test_a_stream_as_slow_as_networks_are(counting: Server) -> None:
    # The kernel gathers a quarter of a MiB.
    check(lambda: trickle(counting, 8 * MIB), {"splice blocked": 6, "splice": 18})


def test_a_download(counting: Server) -> None:
    check(lambda: download(counting, SIZE), {"sendfile": 3, "send": 0.2})


def test_allocations(counting: Server) -> None:
    ask(counting, "/allocations")
    upload(counting, SIZE)
    peak = ask(counting, "/allocations")["peak"]
    print(f"{peak / KIB:.0f} KiB were allocated at most")
    assert peak < 2 * MIB


def memory(process: int) -> int:
    """Return how many bytes a process has in memory, what it shares being divided."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(int(kib) * KIB for kib in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))


def start_bodies(server: Server, count: int, stack: ExitStack) -> None:
    """Send the first byte of many bodies."""
    paths = [server.client.create(1_000_000) for _ in range(count)]
    for path in paths:
        connection = stack.enter_context(server.client.start_patch(path, 0, 1_000_000))
        connection.send(b"x")
    for path in paths:
        wait_until(lambda path=path: server.stored(path) == 1, "a byte on disk")


def test_connections_in_mid_body(counting: Server) -> None:
    (worker,), count = counting.workers(), 300
    with ExitStack() as stack:
        start_bodies(counting, 50, stack)  # so that what all share is there
        before = memory(worker)
        start_bodies(counting, count, stack)
        each = (memory(worker) - before) / count
    print(f"{each / KIB:.1f} KiB for each connection")
    # Python 3.10 takes half as much again as later ones.
    assert each < 48 * KIB


def requests(server: Server, connection: Connection, kind: str, count: int) -> None:
    """Send small requests of one kind."""
    path = server.client.create(10**6)
    for n in range(count):
        if kind == "HEAD":
            answer = connection.request("HEAD", path, TUS)
        elif kind == "POST":
            headers = {**BYTES, "Upload-Length": 2 * KIB}
            answer = connection.request("POST", "/files/", headers, bytes(KIB))
        else:
            answer = connection.request("PATCH", path, patch_headers(n * KIB), bytes(KIB))
        assert answer.status < 300


def functions(server: Server, kind: str) -> tuple[float, float]:
    """Return how many functions a small request calls, and how many of ours."""
    told = []
    with server.client.connect() as connection:
        for count in (3, 10, 30):  # the first time what is made once is counted, too
            connection.request("GET", "/profile", {})
            requests(server, connection, kind, count)
            told.append(json.loads(connection.request("GET", "/profile/end", {}).body))
    _, few, many = told
    all_calls, ours = ((many[key] - few[key]) / 20 for key in ("functions", "our functions"))
    print(f"{kind}: {all_calls:.0f} calls of functions, {ours:.0f} of them ours")
    return all_calls, ours


@pytest.mark.parametrize(
    ("kind", "all_calls", "our_calls"),
    [("HEAD", 180, 130), ("POST", 345, 235), ("PATCH", 430, 285)],
)
def test_functions_of_a_small_request(
    counting: Server, kind: str, all_calls: int, our_calls: int
) -> None:
    called, ours = functions(counting, kind)
    assert ours <= our_calls
    assert called <= all_calls


@pytest.mark.parametrize(("kind", "calls"), [("HEAD", 30), ("POST", 90), ("PATCH", 60)])
def test_functions_that_count(counting: Server, measured: Server, kind: str, calls: int) -> None:
    (without, _), (called, _) = functions(counting, kind), functions(measured, kind)
    assert called - without <= calls


@pytest.mark.parametrize(
    ("kind", "writes", "reads"), [("HEAD", 0, 1), ("POST", 1, 0), ("PATCH", 1, 2)]
)
def test_transactions_of_a_small_request(
    counting: Server, kind: str, writes: int, reads: int
) -> None:
    few, many = 10, 30
    with counting.client.connect() as connection:
        with counted(counting) as first:
            requests(counting, connection, kind, few)
        with counted(counting) as second:
            requests(counting, connection, kind, many)
    each = {name: (second[name] - first.get(name, 0)) / (many - few) for name in second}
    assert (each["BEGIN"], each["COMMIT"]) == (writes, writes)
    assert each.get("SELECT", 0) <= reads
