"""Everything at once: clients that only know how to resume, and a server that keeps dying."""

from __future__ import annotations

import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2e.client import content
from e2e.conftest import Serve, Server, free_port
from e2e.uploader import Uploader, report, wait_for_progress

SIZE = 8_000_000


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


def chaos(serve: Serve, uploads: int, strikes: int, *flags: str) -> None:
    server = serve("--port", str(free_port()), *flags)
    client = server.client
    uploaders = [
        Uploader(lambda: client, content(SIZE, seed), random.Random(random.random()))
        for seed in range(uploads)
    ]
    # Some have a rival that sends the same file to the same URL.
    for one in uploaders[: uploads // 2]:
        one.path = client.create(SIZE)
        rival = Uploader(lambda: client, one.data, random.Random(random.random()), one.path)
        uploaders.append(rival)
    done: Counter[str] = Counter()
    with ThreadPoolExecutor(len(uploaders)) as pool:
        running = [pool.submit(one.run) for one in uploaders]
        for _ in range(strikes):
            wait_for_progress(uploaders, running, 1_000_000)
            done[strike(server)] += 1
        for one in running:
            one.result()
    report(uploaders, done)
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
