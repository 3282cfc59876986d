"""Whatever one client sends, the others of the same worker are served in between."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import ssl
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

import pytest

from e2e.client import (
    BYTES,
    MB,
    PATIENCE,
    TUS,
    Client,
    Connection,
    chunk,
    content,
    wait_until,
)
from e2e.conftest import SERVE, Serve, Server, running

UNKNOWN = "/files/00000000000000000000000000000000"

#: How much longer than beside an ordinary upload others may wait, at least once in some tries:
#: a machine has pauses of its own. Who has to wait for the end of an abuse waits 100 times as long.
FACTOR = 12
TRIES = 4

#: The head of a PATCH whose body has chunks.
CHUNKED = {**BYTES, "Upload-Offset": 0, "Transfer-Encoding": "chunked"}

KIB = 1024


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one worker."""
    data_dir = tmp_path_factory.mktemp("fairness") / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "1"]
    with running(Server(command, data_dir)) as server:
        yield server


class Watcher:
    """Asks a server again and again and remembers the longest time to an answer, in seconds."""

    def __init__(self, client: Client) -> None:
        self.longest, self._client, self._enough = 0.0, client, Event()
        self._thread = Thread(target=self._ask)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough.set()
        self._thread.join()

    def _ask(self) -> None:
        with self._client.connect() as connection:
            connection.request("GET", "/health", {})
            while not self._enough.is_set():
                began = time.monotonic()
                assert connection.request("GET", "/health", {}).status == 200
                self.longest = max(self.longest, time.monotonic() - began)
                self._enough.wait(0.002)


def send_all(connection: Connection, block: bytes, times: int) -> None:
    """Send a block again and again, or until the server has enough of it."""
    try:
        for _ in range(times):
            connection.send(block)
    except OSError:
        pass


def ordinary(client: Client) -> None:
    """Upload as most clients do."""
    data = content(MB)
    path = client.create(64 * MB)
    with client.start_patch(path, 0, 64 * MB) as connection:
        send_all(connection, data, 64)
        assert connection.read().status == 204


def assert_others_are_served(client: Client, abuse: Callable[[Client], None]) -> None:
    seen = []
    for _ in range(TRIES):
        with Watcher(client) as usual:
            ordinary(client)
        with Watcher(client) as watcher:
            abuse(client)
        seen.append((usual.longest, watcher.longest))
        if watcher.longest < FACTOR * usual.longest:
            return
    pytest.fail(f"others waited for too long, usually and beside the abuse: {seen}")


FIELDS = b"".join(b"X-%d: %b\r\n" % (n, b"y" * 65_000) for n in range(98))


def long_head(client: Client) -> None:
    with client.connect() as connection:
        # Whoever sends all of it before it reads gets the answer, too.
        connection.send(b"GET / HTTP/1.1\r\n" + FIELDS)
        answer = connection.read()
        assert (answer.status, answer.closes) == (431, True)
        assert answer.headers["content-type"] == "text/html"
        assert connection.is_closed()


def long_trailers(client: Client) -> None:
    path = client.create(10)
    with client.connect() as connection:
        connection.send_head("PATCH", path, CHUNKED)
        connection.send(chunk(b"01234") + b"0\r\n" + FIELDS)
        answer = connection.read()
        assert (answer.status, answer.closes) == (400, True)
        assert b"trailers" in answer.body
        assert connection.is_closed()
    assert client.offset(path) == 5


def long_trailers_that_nobody_wants(client: Client) -> None:
    for path, status in ((UNKNOWN, 404), ("/nowhere", 404), ("/health", 405)):
        with client.connect() as connection:
            connection.send_head("PATCH", path, CHUNKED)
            send_all(connection, b"0\r\n" + FIELDS, 1)
            assert connection.read().status == status
            assert connection.is_closed()


def small_lines_without_an_end(client: Client) -> None:
    with client.connect() as connection:
        connection.send(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * MB)
        assert connection.read().status == 431
        assert connection.is_closed()


#: A megabyte in chunks of a byte, less than that of what they carry.
CRUMBS = b"1\r\nx\r\n" * (MB // 6)


def crumbs(client: Client) -> None:
    path = client.create(None)
    with client.start_patch(path, 0, None) as connection:
        send_all(connection, CRUMBS, 6)
        connection.send(chunk(b""))
        answer = connection.read()
        assert (answer.status, answer.offset) == (204, len(CRUMBS) // 6 * 6)


def crumbs_that_nobody_wants(client: Client) -> None:
    for path in (UNKNOWN, "/nowhere"):
        with client.connect() as connection:
            connection.send_head("PATCH", path, CHUNKED)
            send_all(connection, CRUMBS, 3)
            assert connection.read().status == 404


def an_endless_body(client: Client) -> None:
    for path, status in (("/health", 405), ("/nowhere", 404)):
        with client.connect() as connection:
            connection.send_head("POST", path, {"Content-Length": 2**40})
            send_all(connection, bytes(MB), 200)
            answer = connection.read()
            assert (answer.status, answer.closes) == (status, True)


@pytest.mark.parametrize(
    "abuse",
    [
        long_head,
        long_trailers,
        long_trailers_that_nobody_wants,
        small_lines_without_an_end,
        crumbs,
        crumbs_that_nobody_wants,
        an_endless_body,
    ],
)
def test_others_are_served_meanwhile(alone: Server, abuse: Callable[[Client], None]) -> None:
    assert_others_are_served(alone.client, abuse)


def test_others_are_served_over_tls(
    serve: Serve, tls_flags: tuple[list[str], ssl.SSLContext]
) -> None:
    client = serve(*tls_flags[0], workers=1, tls=tls_flags[1]).client
    for abuse in (crumbs, an_endless_body):
        assert_others_are_served(client, abuse)


def test_a_row_of_requests_that_come_one_at_a_time(serve: Serve) -> None:
    """Each is as long as what the server takes from a socket at once."""
    server, count = serve("--access-log", workers=1), 40
    (worker,) = server.workers()
    with ExitStack() as stack:
        first, greedy, last = (stack.enter_context(server.client.connect()) for _ in range(3))
        for connection in (first, greedy, last):
            assert connection.request("GET", "/health", {}).status == 200
        bare = len(greedy.head("GET", "/row", {"X": ""}))
        row = [greedy.head("GET", "/row", {"X": "y" * (8 * KIB - bare)})] * count
        greedy._methods.extend(["GET"] * (count - 1))
        sender = Thread(target=greedy.send, args=[b"".join(row)])
        # What it finds when it goes on: the whole row, and others on both sides of it.
        os.kill(worker, signal.SIGSTOP)
        try:
            first.send_head("GET", "/other", {})
            sender.start()
            wait_until(lambda: waiting_bytes(greedy) > 32 * KIB, "a row of requests")
            last.send_head("GET", "/other", {})
        finally:
            os.kill(worker, signal.SIGCONT)
        assert (first.read().status, last.read().status) == (404, 404)
        assert {greedy.read().status for _ in range(count)} == {404}
        sender.join()
    wait_until(lambda: server.log.count("GET /row") == count, "lines in the log")
    asked = re.findall(r"GET /(row|other)", server.log)
    # How many of the row are there at once is the kernel's affair: some twenty.
    assert "other" not in asked[14:], "the others were served after the row"


def waiting_bytes(connection: Connection) -> int:
    """Return how many bytes were sent and are not in the hands of the server's kernel."""
    answer = fcntl.ioctl(connection.sock, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])


def test_heads_without_an_end_take_little_memory(serve: Serve) -> None:
    server = serve(workers=1)
    ordinary(server.client)
    before = server.highest_memory()
    with ExitStack() as stack:
        connections = [stack.enter_context(server.client.connect()) for _ in range(12)]
        for connection in connections:
            send_all(connection, b"GET / HTTP/1.1\r\n" + FIELDS, 1)
        for connection in connections:
            assert connection.read().status == 431
    # Twelve times the limit is 1.5 MB; what was sent is 76 MB.
    assert server.highest_memory() - before < 15 * MB


def test_a_thousand_parts_fit_into_a_head(client: Client) -> None:
    paths, origin = [], f"http://{client.origin.host}"
    with client.connect() as connection:
        for number in range(1000):
            headers = {**BYTES, "Upload-Length": 1, "Upload-Concat": "partial"}
            answer = connection.request("POST", "/files/", headers, b"%d" % (number % 10))
            assert answer.status == 201
            paths.append(answer.headers["location"].removeprefix(origin))
        final = "final;" + " ".join(paths)
        answer = connection.request("POST", "/files/", {**TUS, "Upload-Concat": final})
        assert answer.status == 201
        path = answer.headers["location"].removeprefix(origin)
        assert connection.request("GET", path, {}).body == b"0123456789" * 100


@pytest.mark.parametrize("size", [0, 1, 65_000])
def test_the_longest_field(client: Client, size: int) -> None:
    with client.connect() as connection:
        assert connection.request("GET", "/health", {"X": "y" * size}).status == 200
        assert connection.request("GET", "/health", {"X": "y" * 66_000}).status == 431
        assert connection.is_closed()


def test_the_longest_head_is_configurable(serve: Serve) -> None:
    client = serve("--max-head-size", "32KiB", workers=1).client
    fields = {f"X-{n}": "y" * 1000 for n in range(30)}
    with client.connect() as connection:
        assert connection.request("GET", "/health", {"X": "y" * 16_000}).status == 200
        assert connection.request("GET", "/health", fields).status == 200
        assert connection.request("GET", "/health", {**fields, "X": "y" * 3000}).status == 431
    assert client.request("GET", "/health", {"X": "y" * 17_000}).status == 431


@pytest.mark.parametrize("end", [b"\n\n", b"\n\r\n", b"\r\n\n"])
def test_lines_without_cr_are_refused_at_once(client: Client, end: bytes) -> None:
    with client.connect() as connection:
        connection.send(b"GET /health HTTP/1.1\nHost: x" + end)
        answer = connection.read()
        assert (answer.status, answer.closes) == (400, True)
        assert connection.is_closed()


@contextmanager
def posting(client: Client, length: int | None, **headers: str) -> Iterator[Connection]:
    framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": length}
    with client.connect() as connection:
        connection.send_head("POST", "/nowhere", {**framing, **headers})
        yield connection


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_short_body_that_nobody_reads_keeps_the_connection(client: Client, chunked: bool) -> None:
    data = content(200_000)
    with posting(client, None if chunked else len(data)) as connection:
        connection.send(chunk(data) + chunk(b"") if chunked else data)
        assert connection.read().status == 404
        assert connection.request("GET", "/health", {}).status == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_client_may_send_a_long_body_before_it_reads(client: Client, chunked: bool) -> None:
    data = content(20 * MB)
    with posting(client, None if chunked else len(data)) as connection:
        connection.send(chunk(data) + chunk(b"") if chunked else data)
        assert connection.read().status == 404
        assert connection.is_closed()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_last_answer_of_a_connection_reaches_who_still_sends(
    client: Client, version: str
) -> None:
    with client.connect() as connection:
        headers = {"Content-Length": 20 * MB, "Connection": "close"}
        connection.send(connection.head("POST", "/nowhere", headers, version=version))
        connection.send(bytes(20 * MB))
        assert connection.read().status == 404
        assert connection.is_closed()


@pytest.mark.parametrize("length", [100, None], ids=["length", "chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(client: Client, length: int | None) -> None:
    with posting(client, length) as connection:
        connection.send(b"1")
        assert connection.read().status == 404
        assert connection.is_closed()


def test_a_body_that_was_not_asked_for_is_not_waited_for(client: Client) -> None:
    with posting(client, 100, Expect="100-continue") as connection:
        answer = connection.read()
        assert (answer.status, answer.interim) == (404, ())
        assert connection.is_closed()


@pytest.mark.parametrize("path", [UNKNOWN, "/nowhere"])
def test_an_endless_line_is_not_waited_for(client: Client, path: str) -> None:
    """It trickles, so that bytes arrive all the time and none of them belongs to the body."""
    began = time.monotonic()
    with client.connect() as connection:
        connection.send(connection.head("PATCH", path, CHUNKED) + b"1;a=")
        while time.monotonic() - began < PATIENCE / 2:
            try:
                connection.send(b"x")
            except OSError:
                return
            time.sleep(0.1)
    pytest.fail("the connection is still open")


def test_trailers_reach_the_upload_in_small_pieces(client: Client) -> None:
    path = client.create(3)
    with client.connect() as connection:
        connection.send(connection.head("PATCH", path, {**CHUNKED, "Trailer": "A"}))
        for byte in b"1\r\nx\r\n" * 3 + b"0\r\nA: b\r\n\r\n" + connection.head("HEAD", path, TUS):
            connection.send(bytes([byte]))
        assert connection.read().offset == 3
        assert connection.read().offset == 3
