"""The server stops and reloads: uploads in flight are told to come back, and lose nothing."""

from __future__ import annotations

import signal
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event

import pytest

from e2e.client import BYTES, MB, TUS, Connection, Origin, Response, content, path_of, wait_until
from e2e.conftest import Serve, Server
from tuswsgi.lockers.lock_files import is_locked

SIZE = 5_000_000

#: Well before the default ``graceful_timeout``, after which gunicorn kills its workers.
EARLY = 20.0


@contextmanager
def in_mid_body(server: Server, count: int) -> Iterator[dict[str, tuple[Connection, int]]]:
    """Let uploads get stuck in mid-body; yields connections and offsets by path."""
    data = content(SIZE)
    with ExitStack() as stack:
        uploads = {}
        for n in range(count):
            path, sent = server.client.create(SIZE), 100_000 * n + n
            length = None if n % 2 else SIZE
            patch = server.client.start_patch(path, 0, length, data[:sent])
            connection = stack.enter_context(patch)
            uploads[path] = (connection, sent)
        for path, (_, sent) in uploads.items():
            wait_until(lambda path=path, sent=sent: server.stored(path) == sent, "bytes on disk")
            locks = server.data_dir / ".tuswsgi" / "locks"
            id = path.rpartition("/")[2]
            wait_until(lambda locks=locks, id=id: is_locked(locks, id), "the lock")
        yield uploads


def check_told_to_come_back(answer: Response) -> None:
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.closes


def test_sigterm_in_mid_body(serve: Serve) -> None:
    server, data = serve(), content(SIZE)
    with in_mid_body(server, 8) as uploads:
        start = time.monotonic()
        server.signal(signal.SIGTERM)
        for connection, _ in uploads.values():
            check_told_to_come_back(connection.read())
            assert connection.is_closed()
        assert server.wait() == 0
        assert time.monotonic() - start < EARLY
    server.restart()
    for path, (_, sent) in uploads.items():
        assert server.client.offset(path) == sent
        server.client.finish(path, data)
        assert server.client.get(path).body == data


@pytest.mark.parametrize("strike", [Server.signal_all, Server.signal])
def test_ctrl_c_in_mid_body(serve: Serve, strike: Callable[[Server, signal.Signals], None]) -> None:
    server, data = serve(), content(SIZE)
    with in_mid_body(server, 6) as uploads, server.client.connect() as creation:
        files = {*server.data_dir.iterdir()}
        headers = {**TUS, **BYTES, "Upload-Length": SIZE, "Content-Length": SIZE}
        creation.send_head("POST", "/files/", headers)
        creation.send(data[:MB])
        wait_until(lambda: len({*server.data_dir.iterdir()} - files) == 1, "the file of the POST")
        (file,) = {*server.data_dir.iterdir()} - files
        wait_until(lambda: file.stat().st_size == MB, "its bytes")
        strike(server, signal.SIGINT)
        for connection, _ in uploads.values():
            check_told_to_come_back(connection.read())
            assert connection.is_closed()
        created = creation.read()
        assert (created.status, created.offset) == (201, MB)
        assert server.wait() == 0
    server.restart()
    for path, (_, sent) in uploads.items():
        assert server.client.offset(path) == sent
        server.client.finish(path, data)
    assert server.client.offset(path_of(created)) == MB
    server.client.finish(path_of(created), data)
    assert server.file(path_of(created)) == file


def test_sigterm_while_clients_send(serve: Serve) -> None:
    """Clients that never pause get to read the answer, too."""
    server, block = serve(), content(500_000)
    size = 10_000_000_000

    def send(path: str) -> Response:
        with server.client.start_patch(path, 0, size) as connection:
            return connection.send_until_answered(block)

    paths = [server.client.create(size) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(send, path) for path in paths]
        wait_until(lambda: all(server.stored(path) > 1_000_000 for path in paths), "bytes")
        server.signal(signal.SIGTERM)
        for answer in answers:
            check_told_to_come_back(answer.result())
    assert server.wait() == 0
    server.restart()
    for path in paths:
        offset = server.client.offset(path)
        assert 1_000_000 < offset == server.stored(path)
        with server.file(path).open("rb") as file:
            while read := file.read(len(block)):
                assert block.startswith(read)
        assert server.client.request("DELETE", path, TUS).status == 204


def test_idle_connections_do_not_hold_up_the_end(serve: Serve) -> None:
    server = serve()
    with server.client.connect() as idle, server.client.connect() as silent:
        assert idle.request("OPTIONS", "/files/", {}).status == 204
        silent.send(b"OPTIONS /fi")
        wait_until(lambda: server.worker_of(silent), "a worker")
        start = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < EARLY
        assert idle.is_closed()
        assert silent.is_closed()


def test_sighup_in_mid_body(serve: Serve) -> None:
    server, data = serve(), content(SIZE)
    before = set(server.workers())
    with in_mid_body(server, 6) as uploads:
        server.signal(signal.SIGHUP)
        for connection, _ in uploads.values():
            check_told_to_come_back(connection.read())
        for path, (_, sent) in uploads.items():
            assert server.client.offset(path) == sent
            server.client.finish(path, data)
    wait_until(lambda: before.isdisjoint(server.workers()), "new workers")
    # gunicorn may have replaced an old worker that ended quickly, and ends the one too many.
    wait_until(lambda: len(server.workers()) == 2, "two workers")
    assert server.client.get(path).body == data


def test_sighup_under_load(serve: Serve) -> None:
    server, data, done = serve(), content(600_000), Event()
    client = server.client

    def upload() -> Counter[int]:
        """Upload again and again; only passing trouble may be met, and no broken connection."""
        statuses: Counter[int] = Counter()
        while not done.is_set():
            path = client.create(len(data))
            while (head := client.head(path)).status != 200 or head.offset < len(data):
                statuses[head.status] += 1
                if head.status == 200:
                    block = data[head.offset : head.offset + 250_000]
                    statuses[client.patch(path, head.offset, block).status] += 1
            assert client.get(path).body == data
        return statuses

    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(upload) for _ in range(6)]
        try:
            for _ in range(3):
                before = set(server.workers())
                server.signal(signal.SIGHUP)
                wait_until(lambda old=before: old.isdisjoint(server.workers()), "new workers")
        finally:
            done.set()
        statuses = sum((load.result() for load in loads), Counter[int]())
    print(f"answers during three reloads: {dict(statuses)}")
    assert set(statuses) <= {200, 204, 409, 423, 503}
    assert statuses[204] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops(serve: Serve, number: signal.Signals) -> None:
    server = serve()
    assert server.client.offset(server.client.create(1)) == 0
    server.signal(number)
    assert server.wait() == 0


def test_a_request_before_the_end_of_another_is_answered(serve: Serve) -> None:
    """What is not waiting for a body comes to its end."""
    server, data = serve(), content(30_000_000)
    path = server.client.create(len(data))
    server.client.finish(path, data)
    with server.client.connect() as connection:
        connection.send_head("GET", path, {})
        connection.wait_for_bytes()
        server.signal(signal.SIGTERM)
        assert connection.read().body == data
    assert server.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        server.client.connect()


def test_a_connection_that_begins_as_the_server_stops(
    serve: Serve, tls_flags: tuple[list[str], ssl.SSLContext]
) -> None:
    """It was accepted, so it is served: it does not fail since the listener is gone."""
    flags, context = tls_flags
    server = serve(*flags, tls=context)
    address = server.client.origin.address
    with Connection(Origin(address)) as connection:
        wait_until(lambda: server.worker_of(connection), "a worker")
        server.signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "the end of the listeners")
        try:
            connection.sock = context.wrap_socket(connection.sock, server_hostname="127.0.0.1")
            assert connection.request("OPTIONS", "/files/", {}).status == 204
        except OSError:
            # On a busy machine the last call was over. What matters is in the server's log.
            pass
    assert server.wait() == 0


def refuses(server: Server) -> bool:
    try:
        Connection(Origin(server.client.origin.address)).close()
    except ConnectionRefusedError:
        return True
    return False
