"""The clean-up among real servers: one leads, another follows, and nobody is disturbed."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from e2e.client import BYTES, MB, TUS, chunk, content, path_of, wait_until
from e2e.conftest import SERVE, Serve, Server, running

#: What a server says of each upload that it removes: the worker's pid, and the id.
_REMOVED = re.compile(r"\[(\d+)\] \[INFO\] Removed (\S+) \((\w[\w ]*)\)")

#: Ages that tests can wait for.
OFTEN = ("--gc-interval", "1s")
SOON = (*OFTEN, "--gc-grace", "2s", "--network-timeout", "2s")


def removed(*servers: Server) -> list[tuple[int, str]]:
    """Return the pids of workers with the ids of what they removed, in no certain order."""
    found = (_REMOVED.search(line) for server in servers for line in server.log.splitlines())
    return [(int(match[1]), match[2]) for match in found if match]


def id_of(path: str) -> str:
    return path.rpartition("/")[2]


class Hosts:
    """Servers that share uploads and a locker on a server, but no kernel."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.servers: list[Server] = []

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            *("--data-dir", str(self._directory / "data"), "--locker", "db-locker"),
            *("--lock-lease", "2", "--runtime-dir", str(self._directory / "operator")),
        )

    def start(self, *flags: str, workers: int = 2) -> Server:
        own = str(self._directory / f"host{len(self.servers)}")
        command = [*SERVE, "--workers", str(workers), *self.flags, "--runtime-dir", own, *flags]
        server = self._stack.enter_context(running(Server(command, self._directory / "data")))
        self.servers.append(server)
        return server


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(tmp_path, stack)


def start_gc(flags: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tuswsgi", "gc", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def create_many(server: Server, count: int) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return [*pool.map(lambda _: id_of(server.client.create(10)), range(count))]


def test_two_servers_and_an_operator_at_once(hosts: Hosts) -> None:
    """Each upload is removed once, whoever comes first."""
    ids = create_many(hosts.start(), 300)
    hosts.servers[0].kill()
    age = ("--gc-unfinished-age", "0")
    operators = [start_gc((*hosts.flags, *age)) for _ in range(2)]
    servers = [hosts.start(*OFTEN, *age) for _ in range(2)]
    outputs = [operator.communicate(timeout=120)[0] for operator in operators]
    assert [operator.returncode for operator in operators] == [0, 0], outputs
    client = servers[0].client
    wait_until(
        lambda: all(client.head(f"/files/{id}").status == 410 for id in ids), "the last removal"
    )
    told = [re.match(r"(\d+) removed", output) for output in outputs]
    by_operators = sum(int(match[1]) for match in told if match)
    by_servers = len(ids) - by_operators
    wait_until(lambda: len(removed(*servers)) >= by_servers, "the last line of a log")
    assert len({id for _, id in removed(*servers)}) == len(removed(*servers)) == by_servers
    print(f"{by_operators} by operators, {by_servers} by servers")


@pytest.mark.parametrize("among", ["workers", "hosts"])
def test_a_leader_that_is_killed_is_followed(hosts: Hosts, among: str) -> None:
    flags = (*OFTEN, "--gc-unfinished-age", "1s")
    servers = [hosts.start(*flags, workers=1 if among == "hosts" else 2)]
    if among == "hosts":
        servers.append(hosts.start(*flags, workers=1))
    client, leaders = servers[-1].client, []
    for _ in range(3 if among == "workers" else 2):
        ids = set(create_many(servers[-1], 40))
        first = len(removed(*servers))
        wait_until(lambda first=first: len(removed(*servers)) > first, "a removal")  # type: ignore[misc]
        leader = removed(*servers)[-1][0]
        os.kill(leader, signal.SIGKILL)  # in the middle, or shortly after
        leaders.append(leader)
        wait_until(
            lambda ids=ids: all(client.head(f"/files/{id}").status == 410 for id in ids),  # type: ignore[misc]
            "the next leader",
        )
    assert max(Counter(id for _, id in removed(*servers)).values()) == 1
    # Nobody else has removed anything but those who led, one after the other.
    by = [pid for pid, _ in removed(*servers)]
    assert set(leaders) <= set(by)
    assert len(set(by)) <= len(leaders) + 1


def test_a_running_upload_is_not_disturbed(serve: Serve) -> None:
    server, data = serve(*OFTEN, "--gc-unfinished-age", "1s"), content(300_000)
    path, idle = server.client.create(len(data)), server.client.create(5)
    with server.client.start_patch(path, 0, len(data), data[:100_000]) as connection:
        server.wait_for(f"Removed {id_of(idle)}")
        # It is old enough, too: look whether one more sweep takes it.
        second = server.client.create(5)
        server.wait_for(f"Removed {id_of(second)}")
        flags = ("--data-dir", str(server.data_dir), "--gc-unfinished-age", "0")
        for more in ((), ("--dry-run",)):
            gc = start_gc((*flags, *more))
            output, _ = gc.communicate(timeout=120)
            assert (gc.returncode, id_of(path) in output) == (0, False)
        connection.send(data[100_000:])
        assert connection.read().status == 204
    assert server.client.get(path).body == data


def test_an_operator_finds_the_locks_of_the_servers(serve: Serve, tmp_path: Path) -> None:
    """The unit for systemd says by a flag where they are, which operators do not repeat."""
    server, data = serve("--runtime-dir", str(tmp_path / "run")), content(300_000)
    path = server.client.create(len(data))
    flags = ("--data-dir", str(server.data_dir), "--gc-unfinished-age", "0")
    with server.client.start_patch(path, 0, len(data), data[:100_000]) as connection:
        wait_until(lambda: server.stored(path) == 100_000, "bytes on disk")
        output, _ = (gc := start_gc(flags)).communicate(timeout=120)
        assert (gc.returncode, output) == (0, "Nothing removed.\n")
        for other in (tmp_path / "other", server.data_dir / ".tuswsgi"):
            output, _ = (gc := start_gc((*flags, "--runtime-dir", str(other)))).communicate()
            assert gc.returncode == 1
            assert output == (
                f"A server on {server.data_dir} has its locks in the runtime directory "
                f"{tmp_path / 'run'}, not {other}: add --runtime-dir {tmp_path / 'run'}.\n"
            )
        connection.send(data[100_000:])
        assert connection.read().status == 204
    path = server.client.create(5)
    server.kill()
    other = ("--runtime-dir", str(tmp_path / "other"))
    output, _ = (gc := start_gc((*flags, *other))).communicate(timeout=120)
    assert (gc.returncode, output) == (0, "1 removed (1 unfinished), 0 bytes.\n")


def test_two_servers_with_different_locks_are_told_of(serve: Serve, tmp_path: Path) -> None:
    server = serve("--runtime-dir", str(tmp_path / "one"))
    server.client.create(5)
    other = serve("--runtime-dir", str(tmp_path / "two"))
    other.wait_for("Another server on .* Set the same runtime_dir for both")


def test_an_operator_removes_an_upload_that_is_received(serve: Serve) -> None:
    server = serve()
    path = server.client.create(200_000)
    with server.client.start_patch(path, 0, 200_000, bytes(100_000)) as connection:
        wait_until(lambda: server.stored(path) == 100_000, "bytes on disk")
        command = [sys.executable, "-m", "tuswsgi", "uploads", "rm", "--yes", id_of(path)]
        subprocess.run([*command, "--data-dir", str(server.data_dir)], check=True, timeout=120)
        assert connection.read().status == 423
    assert server.client.head(path).status == 410
    assert not server.file(path).exists()


def gone_at(file: Path) -> float:
    """Wait until a file is gone and return when that was."""
    wait_until(lambda: not file.exists(), f"the end of {file.name}")
    return time.time()


def test_bytes_of_a_killed_post_go_after_the_grace(serve: Serve) -> None:
    server = serve(*SOON, "--gc-quarantine-age", "3s", workers=1)
    known = server.client.create(5)
    files = set(server.data_dir.iterdir())
    with server.client.connect() as connection:
        headers = {**TUS, **BYTES, "Upload-Length": 2 * MB, "Content-Length": 2 * MB}
        connection.send_head("POST", "/files/", headers)
        connection.send(bytes(MB))
        wait_until(lambda: len({*server.data_dir.iterdir()} - files) == 1, "the file of the POST")
        (file,) = {*server.data_dir.iterdir()} - files
        wait_until(lambda: file.stat().st_size == MB, "its bytes")
        server.kill()
    changed = file.stat().st_mtime
    server.start()
    server.client.create(5)
    assert gone_at(file) - changed >= 4
    told = server.wait_for(rf"{file.name} \({MB} bytes\) has no record: it was moved to (\S+)")
    moved = time.time()
    assert gone_at(Path(told[1])) - moved >= 2
    server.wait_for(rf"Removed {file.name} \(quarantine\): \d+ s old, {MB} bytes")
    assert server.client.offset(known) == 0


def test_bytes_without_a_record_are_found_in_the_quarantine(serve: Serve) -> None:
    server = serve(*SOON)
    known, data = server.client.create(5), content(300_000)
    path = server.client.create(len(data))
    server.client.finish(path, data)
    server.kill()
    with closing(sqlite3.connect(server.data_dir / ".tuswsgi" / "info.sqlite3")) as records:
        backup = records.execute("SELECT * FROM tuswsgi_uploads WHERE id = ?", (id_of(path),))
        (row,) = backup.fetchall()
        records.execute("DELETE FROM tuswsgi_uploads WHERE id = ?", (id_of(path),))
        records.commit()
        server.start()
        server.client.create(5)
        told = server.wait_for(rf"{id_of(path)} .* has no record: it was moved to (\S+)")
        assert server.client.get(path).status == 404
        assert Path(told[1]).read_bytes() == data
        # The right records are back, and so is the upload.
        marks = ", ".join("?" * len(row))
        records.execute(f"INSERT INTO tuswsgi_uploads VALUES ({marks})", row)
        records.commit()
    server.wait_for(f"{id_of(path)} has a record now and was put back")
    assert server.client.get(path).body == data
    assert server.client.offset(known) == 0


def test_a_slow_post_keeps_its_bytes(serve: Serve) -> None:
    """It has no record for longer than the grace, but its bytes come."""
    server, piece = serve(*SOON, workers=2), content(100_000)
    server.client.create(5)
    stray, sent = "0" * 32, 0
    (server.data_dir / f".{stray}.concat-0123456789abcdef").touch()
    with server.client.connect() as connection:
        headers = {**TUS, **BYTES, "Upload-Defer-Length": 1, "Transfer-Encoding": "chunked"}
        connection.send_head("POST", "/files/", headers)
        # Until everything was looked at that is as old as the POST, and some time more.
        while sent < 20 or stray not in server.log:
            connection.send(chunk(piece))
            connection.pause(0.4)
            sent += 1
        connection.send(chunk(b""))
        response = connection.read()
    assert (response.status, response.offset) == (201, sent * len(piece))
    assert server.file(path_of(response)).read_bytes() == piece * sent


def test_what_is_left_of_a_killed_concatenation_goes(serve: Serve) -> None:
    """Where files need no names nothing is left; else it is temporary and goes."""
    server, part = serve(workers=1), content(32 * MB)
    path = server.client.create(len(part), Upload_Concat="partial")
    server.client.finish(path, part)
    final = _kill_in_concatenation(server, [path] * 24)
    # This one cannot build it, so that what was left stays as it is.
    cleaner = serve(*SOON, "--max-file-size", "100MB", workers=1)
    wait_until(lambda: not list(server.data_dir.glob(".*.concat-*")), "the end of what was left")
    cleaner.kill()
    server.start()
    response = server.client.head(final)
    assert (response.status, response.offset) == (200, 24 * len(part))
    assert server.stored(final) == 24 * len(part)


def _kill_in_concatenation(server: Server, parts: Sequence[str]) -> str:
    """Kill a server that makes a final upload, and return the upload's path."""
    for _ in range(5):
        known = {path.name for path in server.data_dir.iterdir()}
        with server.client.connect() as connection:
            concat = "final;" + " ".join(parts)
            connection.send_head("POST", "/files/", {**TUS, "Upload-Concat": concat})
            wait_until(lambda: _concatenates(server), "a concatenation")
            server.kill()
        (final,) = (
            path
            for path in server.data_dir.iterdir()
            if path.name not in known and not path.name.startswith(".")
        )
        if final.stat().st_size == 0:
            return f"/files/{final.name}"
        server.start()
    pytest.fail("the kills came too late")


def _concatenates(server: Server) -> bool:
    """Whether a worker writes a file that is to become a final upload, with a name or without."""
    if list(server.data_dir.glob(".*.concat-*")):
        return True
    unnamed = re.compile(rf"{re.escape(str(server.data_dir))}/#\d+ \(deleted\)")
    for worker in server.workers():
        for link in Path(f"/proc/{worker}/fd").glob("*"):
            try:
                if unnamed.fullmatch(os.readlink(link)):
                    return True
            except FileNotFoundError:
                continue  # it was closed a moment ago
    return False
