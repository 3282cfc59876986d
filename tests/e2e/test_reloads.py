"""Deploys do not break uploads: a real client goes on over reloads and restarts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tusclient.client import TusClient
from tusclient.uploader import Uploader

from e2e.client import MB, PATIENCE, content, sha256_of, wait_until
from e2e.conftest import Serve, Server, free_port

RELOAD, RESTART = signal.SIGHUP, signal.SIGTERM

#: Well before the default ``graceful_timeout``, after which gunicorn kills its workers.
EARLY = 20.0


class WatchedUploader(Uploader):  # type: ignore[misc]  # tuspy has no types
    """tuspy's uploader; it notes where each of its requests began.

    :param may_end: set when it may send its last chunk.
    """

    def __init__(self, may_end: Event, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.begun: list[int] = []
        self._may_end = may_end

    def _do_request(self) -> None:
        if self.offset >= self.stop_at - self.chunk_size:
            assert self._may_end.wait(PATIENCE)
        self.begun.append(self.offset)
        super()._do_request()


def strike(server: Server, number: signal.Signals, old: set[int]) -> float:
    """Reload or restart the server and return how long its old workers took to end."""
    began = time.monotonic()
    server.signal(number)
    if number is RESTART:
        assert server.wait() == 0
        took = time.monotonic() - began
        server.start()
        return took
    wait_until(lambda: old.isdisjoint(server.workers()), "the old workers' end")
    return time.monotonic() - began


def hooks_that_wait(server: Server) -> object:
    """Return what ``tuswsgi hooks pending`` says."""
    command = [sys.executable, "-m", "tuswsgi", "hooks", "pending", "--json"]
    environ = {**os.environ, "TUSWSGI_DATA_DIR": str(server.data_dir)}
    return json.loads(subprocess.run(command, capture_output=True, check=True, env=environ).stdout)


@dataclass(frozen=True)
class Load:
    """What clients send at the same time.

    :param chunk: the size of the body of each of their requests.
    """

    uploads: int
    size: int
    chunk: int


def start_uploads(server: Server, load: Load, may_end: Event) -> list[WatchedUploader]:
    client = TusClient(f"http://{server.client.origin.host}/files/")
    uploaders = []
    for n in range(load.uploads):
        stream = io.BytesIO(content(load.size, n))
        uploader = WatchedUploader(
            may_end,
            client=client,
            file_stream=stream,
            chunk_size=load.chunk,
            retries=100,
            retry_delay=0.2,
        )
        uploader.set_url(uploader.create_url())
        uploaders.append(uploader)
    return uploaders


def deploy(serve: Serve, tmp_path: Path, load: Load, strikes: Sequence[signal.Signals]) -> int:
    """Upload while the server is reloaded and restarted, and see what has become of it.

    :returns: how many requests went on in the middle of a chunk that was cut off.
    """
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $TUS_ID" >> {tmp_path}/heard\n')
    hook.chmod(0o755)
    hooks = ("--hooks-file", str(hook), "--hooks", "post-create,post-finish")
    server = serve("--port", str(free_port()), *hooks)
    may_end = Event()
    uploaders = start_uploads(server, load, may_end)
    files = [server.file(one.url) for one in uploaders]
    took = []
    with ThreadPoolExecutor(len(uploaders)) as pool:
        running = [pool.submit(one.upload) for one in uploaders]
        try:
            for n, number in enumerate(strikes, 1):
                wanted = (load.size - load.chunk) * load.uploads * n // (len(strikes) + 1)
                # Looked up before: the strike is to meet the bodies that have just begun.
                old = set(server.workers())
                wait_until(lambda wanted=wanted: sum(map(size_of, files)) >= wanted, "bytes")
                took.append(strike(server, number, old))
        finally:
            may_end.set()
        for one in running:
            one.result()
    print(f"seconds until the old workers had ended: {[round(seconds, 1) for seconds in took]}")
    assert max(took) < EARLY
    for n, (one, file) in enumerate(zip(uploaders, files, strict=True)):
        assert one.begun == sorted(one.begun), "a client had to go back"
        assert sha256_of(file) == hashlib.sha256(content(load.size, n)).hexdigest()
    cut = [begin for one in uploaders for begin in one.begun if begin % load.chunk]
    print(f"{len(cut)} of {sum(len(one.begun) for one in uploaders)} requests went on in a chunk")
    wait_until(lambda: hooks_that_wait(server) == [], "the hooks")
    heard = Counter((tmp_path / "heard").read_text().splitlines())
    assert set(heard) == {
        f"{type} {file.name}" for type in ("post-create", "post-finish") for file in files
    }
    return len(cut)


def size_of(file: Path) -> int:
    return file.stat().st_size


def test_deploys(serve: Serve, tmp_path: Path) -> None:
    deploy(serve, tmp_path, Load(6, 16 * MB, 1 * MB), [RELOAD, RESTART, RELOAD])


@pytest.mark.slow
def test_many_deploys(serve: Serve, tmp_path: Path) -> None:
    strikes = [RELOAD, RELOAD, RESTART, RELOAD, RELOAD, RESTART, RELOAD]
    assert deploy(serve, tmp_path, Load(20, 48 * MB, 8 * MB), strikes) > 0
