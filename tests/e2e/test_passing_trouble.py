"""Trouble that passes: a server lives through it, says what it is, and goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.client import TUS, content, wait_until
from e2e.conftest import Serve, Server


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own below the data directory's name."""
    directory = tmp_path / "data"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "none", str(directory)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"Nothing may be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def remount(disk: Path, how: str) -> None:
    # What processes that died have open is closed a moment later.
    command = ["mount", "-o", f"remount,{how}", str(disk)]
    wait_until(lambda: not subprocess.run(command, capture_output=True).returncode, how)


@contextmanager
def without_workers(server: Server) -> Iterator[None]:
    """Let all workers die, and the next ones begin after the block."""
    server.signal(signal.SIGSTOP)
    before = server.workers()
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: all(_is_dead(worker) for worker in before), "the workers' end")
    yield
    server.signal(signal.SIGCONT)


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("info_storage", ["db-info-storage", "file-info-storage"])
def test_workers_that_begin_on_a_read_only_disk(
    disk: Path, serve: Serve, info_storage: str
) -> None:
    server, data = serve("--info-storage", info_storage, "--metrics"), content(10)
    client = server.client
    path = client.create(10)
    with without_workers(server):
        remount(disk, "ro")
    wait_until(lambda: len(server.workers()) == 2, "new workers")
    answer = client.patch(path, 0, data)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    ready = client.request("GET", "/ready", {})
    assert ready.status == 503
    assert json.loads(ready.body)["checks"]["data_store"] != "ok"
    server.wait_for("Read-only file system")
    assert client.request("GET", "/health", {}).status == 200
    with without_workers(server):
        remount(disk, "rw")
    wait_until(lambda: client.patch(path, 0, data).status == 204, "a server that goes on")
    assert client.get(path).body == data


def test_a_disk_that_is_written_again_while_workers_wait(disk: Path, serve: Serve) -> None:
    server = serve()
    path = server.client.create(10)
    with without_workers(server):
        remount(disk, "ro")
    server.wait_for("Read-only file system")
    remount(disk, "rw")
    wait_until(lambda: server.client.request("HEAD", path, TUS).status == 200, "the next start")
