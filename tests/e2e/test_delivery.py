"""Post-hooks arrive over everything: a receiver that fails and goes, workers that die."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e.client import PATIENCE, TUS, Client, content, path_of, wait_until
from e2e.conftest import Serve, Server

SIZE = 1000


@dataclass(frozen=True)
class Arrival:
    """A hook as the receiver got it.

    :param accepted: whether it said that it has it.
    """

    type: str
    upload: str
    id: str
    accepted: bool
    at: float


class Receiver:
    """An application that is told of uploads.

    :ivar fails: decides of each hook whether it fails.
    :ivar is_down: it breaks off all connections.
    """

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.fails: Callable[[], bool] = lambda: False
        self.is_down = False
        self.breaks = 0
        #: What it takes its time for: nothing, as long as this is set.
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 100

            def handle_error(self, *args: Any) -> None:
                pass  # workers die with open connections

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if self.is_down:
            self.breaks += 1
            handler.close_connection = True
            return
        self.begun.append(handler.headers["Hook-Id"])
        self.gate.wait(PATIENCE)
        fails = self.fails()
        # Half of those that fail have been worked off all the same.
        if not fails or random.random() < 0.5:
            self.arrivals.append(
                Arrival(
                    handler.headers["Hook-Name"],
                    json.loads(body)["upload"]["id"],
                    handler.headers["Hook-Id"],
                    not fails,
                    time.monotonic(),
                )
            )
        handler.send_response(500 if fails else 200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def accepted(self, type: str) -> set[str]:
        """Return the uploads whose hook of this type it has."""
        return {one.upload for one in tuple(self.arrivals) if one.accepted and one.type == type}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


@dataclass
class Uploader:
    """A client that goes on until all its uploads are complete."""

    client: Client
    data: bytes
    done: list[str] = field(default_factory=list)
    statuses: Counter[object] = field(default_factory=Counter)

    def upload(self) -> None:
        path = self._insist(self._create)
        self._insist(lambda: self._patch(path))
        self.done.append(path.rpartition("/")[2])

    def _create(self) -> str | None:
        answer = self.client.request("POST", "/files/", {**TUS, "Upload-Length": len(self.data)})
        self.statuses[answer.status] += 1
        return path_of(answer) if answer.status == 201 else None

    def _patch(self, path: str) -> str | None:
        head = self.client.head(path)
        if head.status != 200:
            return None
        if head.offset == len(self.data):
            return path
        self.statuses[self.client.patch(path, head.offset, self.data[head.offset :]).status] += 1
        return None

    def _insist(self, step: Callable[[], str | None]) -> str:
        while True:
            try:
                if (result := step()) is not None:
                    return result
            except OSError as error:
                self.statuses[type(error).__name__] += 1
                time.sleep(0.02)  # there may be no worker right now


def wait_for_progress(uploader: Uploader, running: list[Future[None]], count: int) -> None:
    before = len(uploader.done)
    wait_until(
        lambda: len(uploader.done) >= before + count or all(one.done() for one in running),
        "uploads",
    )


def outbox(server: Server, which: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tuswsgi", "hooks", which, "--json"]
    result = subprocess.run(
        [*command, "--data-dir", str(server.data_dir)], capture_output=True, text=True, check=True
    )
    events: list[dict[str, Any]] = json.loads(result.stdout)
    return events


def chaos(serve: Serve, receiver: Receiver, uploads: int, kills: int, *flags: str) -> None:
    server = serve(
        *("--hooks", "post-create,post-finish", "--hooks-http-urls", receiver.url),
        *("--hooks-delivery-lease", "2s", "--hooks-delivery-backoff", "100ms"),
        *("--hooks-delivery-max-backoff", "1s", "--log-level", "ERROR"),
        *flags,
    )
    receiver.fails = lambda: random.random() < 0.2
    uploader = Uploader(server.client, content(SIZE))
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(uploader.upload) for _ in range(uploads)]
        for kill in range(kills):
            wait_for_progress(uploader, running, uploads // (kills + 1))
            receiver.is_down = kills / 3 <= kill < kills * 2 / 3
            server.kill_worker()
        receiver.is_down = False
        for one in running:
            one.result()
    finished = set(uploader.done)
    assert len(finished) == uploads
    wait_until(lambda: receiver.accepted("post-finish") >= finished, "all hooks")
    wait_until(lambda: outbox(server, "pending") == [], "an empty outbox")
    assert outbox(server, "dead") == []
    print(f"answers: {dict(uploader.statuses)}; broken off: {receiver.breaks}")
    check(receiver.arrivals, finished)


def check(arrivals: list[Arrival], finished: set[str]) -> None:
    ids: dict[tuple[str, str], set[str]] = {}
    created: set[str] = set()
    for one in arrivals:
        ids.setdefault((one.type, one.upload), set()).add(one.id)
        if one.type == "post-create" and one.accepted:
            created.add(one.upload)
        elif one.type == "post-finish":
            assert one.upload in created, "post-finish came before post-create"
    assert {upload for type, upload in ids if type == "post-finish"} == finished
    assert all(len(of_one) == 1 for of_one in ids.values()), "a hook came with two ids"
    print(f"{len(arrivals)} arrivals of {len(ids)} hooks")


def test_chaos(serve: Serve, receiver: Receiver) -> None:
    chaos(serve, receiver, 150, 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--info-storage", "file-info-storage")], ids=["default", "info files"]
)
def test_much_chaos(serve: Serve, receiver: Receiver, flags: tuple[str, ...]) -> None:
    chaos(serve, receiver, 500, 20, *flags)


def test_what_is_given_up_can_be_tried_again(serve: Serve, receiver: Receiver) -> None:
    server = serve(
        *("--hooks", "post-create,post-finish", "--hooks-http-urls", receiver.url),
        *("--hooks-delivery-attempts", "2", "--hooks-delivery-backoff", "10ms"),
    )
    receiver.fails = lambda: True
    path = server.client.create(SIZE)
    upload = path.rpartition("/")[2]
    server.wait_for("is a dead letter now")
    (letter,) = outbox(server, "dead")
    assert (letter["event"], letter["upload"], letter["attempts"]) == ("post-create", upload, 2)
    assert "500" in letter["error"]
    receiver.fails = lambda: False
    server.client.finish(path, content(SIZE))
    # What nobody could be told of holds up nothing.
    wait_until(lambda: receiver.accepted("post-finish") == {upload}, "the next hook")
    command = [sys.executable, "-m", "tuswsgi", "hooks", "replay", letter["id"]]
    data_dir = ["--data-dir", str(server.data_dir)]
    result = subprocess.run([*command, *data_dir], capture_output=True, text=True, check=True)
    assert result.stdout == "1 will be delivered again.\n"
    wait_until(lambda: receiver.accepted("post-create") == {upload}, "the replayed hook")
    assert {one.id for one in receiver.arrivals if one.type == "post-create"} == {letter["id"]}
    wait_until(lambda: outbox(server, "dead") == outbox(server, "pending") == [], "its end")


def test_hooks_of_a_worker_come_right_after_the_response(serve: Serve, receiver: Receiver) -> None:
    """They are not found by looking now and then, which takes a second and more."""
    server = serve("--hooks", "post-create", "--hooks-http-urls", receiver.url)
    delays = []
    for number in range(30):
        server.client.create(SIZE)
        answered = time.monotonic()
        wait_until(lambda n=number: len(receiver.arrivals) == n + 1, "the hook")
        delays.append(receiver.arrivals[-1].at - answered)
    print(f"median delay {sorted(delays)[15] * 1000:.1f} ms, longest {max(delays) * 1000:.1f}")
    assert sorted(delays)[15] < 1.0


def test_a_server_that_stops_ends_what_it_sends_and_the_next_one_goes_on(
    serve: Serve, receiver: Receiver
) -> None:
    flags = ["--hooks", "post-create,post-finish", "--hooks-http-urls", receiver.url]
    server = serve(*flags, "--hooks-http-timeout", "60s", "--hooks-delivery-lease", "1h")
    receiver.gate.clear()
    path = server.client.create(SIZE)
    server.client.finish(path, content(SIZE))
    wait_until(lambda: receiver.begun, "the first hook")
    server.signal(signal.SIGTERM)
    wait_until(lambda: _is_refused(server.client), "the end of connections")
    receiver.gate.set()
    assert server.wait() == 0
    assert [one.type for one in receiver.arrivals] == ["post-create"]
    server.start()
    wait_until(lambda: len(receiver.arrivals) == 2, "the second hook")
    wait_until(lambda: outbox(server, "pending") == [], "an empty outbox")
    assert [one.type for one in receiver.arrivals] == ["post-create", "post-finish"]


def _is_refused(client: Client) -> bool:
    try:
        client.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_server_that_stops_leaves_what_takes_too_long(serve: Serve, receiver: Receiver) -> None:
    flags = ["--hooks", "post-create", "--hooks-http-urls", receiver.url]
    server = serve(*flags, "--hooks-http-timeout", "60s", "--hooks-delivery-lease", "1h")
    receiver.gate.clear()
    server.client.create(SIZE)
    wait_until(lambda: receiver.begun, "the hook")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    # The claim would hold for an hour.
    server.start()
    wait_until(lambda: len(receiver.begun) == 2, "the hook again")
    receiver.gate.set()
    wait_until(lambda: outbox(server, "pending") == [], "an empty outbox")
    assert len(set(receiver.begun)) == 1
