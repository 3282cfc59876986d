"""Everything at once: clients that only know how to resume, and a server that keeps dying."""

from __future__ import annotations

import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from e2e.client import BYTES, Client, Response, chunk, content, path_of, sha1, wait_until
from e2e.conftest import Serve, Server

SIZE = 8_000_000

#: After these a client comes back.
PASSING = {409, 423, 460, 503}


@dataclass
class Uploader:
    """A client that goes on until its upload is complete."""

    client: Client
    data: bytes
    random: random.Random
    path: str = ""
    acknowledged: int = 0
    statuses: Counter[object] = field(default_factory=Counter)

    def run(self) -> None:
        while not self.path:
            self._try(self._create)
        while self.acknowledged < len(self.data):
            self._try(self._patch)
            self._try(self._head)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            self.statuses[type(error).__name__] += 1
            time.sleep(0.02)  # there may be no server right now

    def _create(self) -> None:
        headers = {**BYTES, "Upload-Length": len(self.data)}
        part = self.data[: self.random.choice([0, 1000, 300_000])]
        answer = self.client.request("POST", "/files/", headers, part)
        self.statuses[answer.status] += 1
        if answer.status == 201:
            self.path = path_of(answer)
            self._check(answer)

    def _head(self) -> None:
        answer = self.client.head(self.path)
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self._check(answer)
        else:
            assert answer.status in PASSING

    def _check(self, answer: Response) -> None:
        assert answer.offset >= self.acknowledged, "acknowledged bytes are lost"
        self.acknowledged = answer.offset

    def _patch(self) -> None:
        start = self.acknowledged
        part = self.data[start : start + self.random.randint(0, 400_000)]
        way = self.random.choice(["length", "chunked", "checksum", "wrong checksum", "abort"])
        chunked = way == "chunked" or (way == "abort" and self.random.random() < 0.5)
        headers = {}
        if way.endswith("checksum"):
            headers["Upload_Checksum"] = sha1(part if way == "checksum" else b"else")
        length = None if chunked else len(part)
        with self.client.start_patch(self.path, start, length, **headers) as connection:
            sent = part[: len(part) // 2] if way == "abort" else part
            if sent:
                connection.send(chunk(sent) if chunked else sent)
            if way == "abort":
                return
            if chunked:
                connection.send(chunk(b""))
            answer = connection.read()
        self.statuses[answer.status] += 1
        if answer.status == 204:
            assert way != "wrong checksum" or not part or sha1(part) == sha1(b"else")
            self._check(answer)
        else:
            assert answer.status in PASSING


def strike(server: Server) -> str:
    """Do something bad to the server."""
    what = random.choice(["kill a worker", "reload", "kill all", "restart"])
    if what == "kill a worker":
        server.kill_worker()
    elif what == "reload":
        server.signal(signal.SIGHUP)
    elif what == "kill all":
        server.restart()
    else:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        server.start()
    return what


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def chaos(serve: Serve, uploads: int, strikes: int, *flags: str) -> None:
    server = serve("--port", str(free_port()), *flags)
    client = server.client
    uploaders = [
        Uploader(client, content(SIZE, seed), random.Random(random.random()))
        for seed in range(uploads)
    ]
    # Some have a rival that sends the same file to the same URL.
    for one in uploaders[: uploads // 2]:
        one.path = client.create(SIZE)
        rival = Uploader(client, one.data, random.Random(random.random()), one.path)
        uploaders.append(rival)
    done: Counter[str] = Counter()
    with ThreadPoolExecutor(len(uploaders)) as pool:
        running = [pool.submit(one.run) for one in uploaders]
        for _ in range(strikes):
            acknowledged = sum(one.acknowledged for one in uploaders)
            wait_until(
                lambda before=acknowledged: (
                    sum(one.acknowledged for one in uploaders) > before + 1_000_000
                    or all(one.done() for one in running)
                ),
                "progress",
            )
            done[strike(server)] += 1
        for one in running:
            one.result()
    print(f"strikes: {dict(done)}")
    print(f"answers: {dict(sum((one.statuses for one in uploaders), Counter()))}")
    for one in uploaders:
        assert client.get(one.path).body == one.data


def test_chaos(serve: Serve) -> None:
    chaos(serve, 6, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [(), ("--force-fsync",), ("--info-storage", "file-info-storage")],
    ids=["default", "force-fsync", "info files"],
)
def test_much_chaos(serve: Serve, flags: tuple[str, ...]) -> None:
    chaos(serve, 20, 60, *flags)
