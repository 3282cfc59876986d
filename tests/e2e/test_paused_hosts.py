"""Hosts that stand still for longer than their leases, and go on as if nothing had happened.

Some servers share the data directory and the server of records and locks. They are stopped
again and again, at any moment, or at the worst: between the last look at the lock and the step
that it is for. When others have taken over they wake up. Whatever was acknowledged stays, and
nothing is finished that is not verified.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from private_servers import PrivateEtcd, PrivatePostgres, PrivateRedis, PrivateServer

from e2e.client import (
    BYTES,
    TUS,
    Client,
    Connection,
    Response,
    chunk,
    content,
    path_of,
    sha1,
    wait_until,
)
from e2e.conftest import SERVE, Server, free_port, running
from e2e.uploader import PASSING

#: Where the servers find what makes them stand still.
STANDING_STILL = Path(__file__).parent / "standing_still"

#: Seconds.
LEASE = 1.0

#: How long an unfinished partial upload stays after its last byte, in seconds. Clean-up runs
#: all the time.
PARTIAL_AGE = 3.0

#: What a checksum is wrong for. Nobody is ever told that these bytes are kept.
GARBAGE = b"\xee"


@dataclass
class Hosts:
    """Servers with a runtime directory each.

    :param pause: for how many seconds they stand still.
    """

    servers: list[Server]
    pause: float

    def client(self) -> Client:
        return random.choice(self.servers).client

    def stop_one(self) -> None:
        """Let a server stand still from this moment on."""
        for worker in random.choice(self.servers).workers():
            os.kill(worker, signal.SIGSTOP)

    def wake(self, is_over: threading.Event) -> int:
        """Wake up whoever has stood still for long enough, and return how often that was."""
        since: dict[int, float] = {}
        count = 0
        while not is_over.wait(0.05) or since:
            now = time.monotonic()
            for worker in (one for server in self.servers for one in server.workers()):
                if not _stands_still(worker):
                    continue
                if now - since.setdefault(worker, now) > self.pause:
                    del since[worker]
                    count += 1
                    os.kill(worker, signal.SIGCONT)
        return count


def _stands_still(worker: int) -> bool:
    try:
        stat = Path(f"/proc/{worker}/stat").read_text()
    except OSError:
        return False  # it ended a moment ago
    return stat.rpartition(")")[2].split()[0] == "T"


@contextmanager
def hosts(
    directory: Path, pause: float, shared: Sequence[PrivateServer], *flags: str
) -> Iterator[Hosts]:
    """Run three servers, each of which stands still now and then.

    :param pause: for how many seconds that is.
    """
    data_dir = directory / "data"
    environ = {
        "PYTHONPATH": os.pathsep.join([str(STANDING_STILL), *sys.path]),
        "STAND_STILL_WITHIN": str(4 * pause),
    }
    with ExitStack() as stack:
        for server in shared:
            stack.callback(server.remove)
        servers = []
        for host in range(3):
            command = [
                *(*SERVE, "--data-dir", str(data_dir), "--port", str(free_port())),
                *("--workers", "1", "--runtime-dir", str(directory / f"host{host}")),
                *("--lock-lease", str(LEASE), "--lock-timeout", "5s", *flags),
            ]
            servers.append(stack.enter_context(running(Server(command, data_dir, environ))))
        yield Hosts(servers, pause)


def with_redis(directory: Path, pause: float, *flags: str) -> AbstractContextManager[Hosts]:
    shared = PrivateRedis()
    records = ("--info-storage", "redis-info-storage", "--info-db-dsn", shared.dsn)
    return hosts(directory, pause, [shared], *records, *flags)


def with_postgres(directory: Path, pause: float, *flags: str) -> AbstractContextManager[Hosts]:
    shared = PrivatePostgres()
    records = ("--info-storage", "db-info-storage", "--info-db-dsn", shared.dsn)
    return hosts(directory, pause, [shared], *records, *flags)


def with_etcd(directory: Path, pause: float, *flags: str) -> AbstractContextManager[Hosts]:
    # Not SQLite: a host that stood still in a transaction would hold up all others.
    etcd, shared = PrivateEtcd(), PrivatePostgres()
    records = ("--info-storage", "db-info-storage", "--info-db-dsn", shared.dsn)
    locks = ("--locker", "etcd-locker", "--locker-dsn", etcd.dsn)
    return hosts(directory, pause, [shared, etcd], *records, *locks, *flags)


class Job:
    """What a client does again and again, and what must hold meanwhile."""

    def __init__(self, hosts: Hosts, seed: int) -> None:
        self.hosts = hosts
        self.random = random.Random(seed)
        self.answers: Counter[str] = Counter()
        self.done = 0

    def run_until(self, is_over: threading.Event) -> None:
        while not is_over.is_set():
            self.run()
            self.done += 1

    def run(self) -> None:
        raise NotImplementedError

    def connect(self) -> Connection:
        """Connect to any server, for a moment: it may be one that stands still."""
        connection = self.hosts.client().connect()
        # Each request that is given up waits on in its server.
        connection.sock.settimeout(self.hosts.pause / 2)
        return connection

    def ask(
        self, method: str, path: str, headers: dict[str, str | int], body: bytes = b""
    ) -> Response | None:
        """Return an answer that is not "come back later", ``None`` if there was none."""
        try:
            with self.connect() as connection:
                answer = connection.request(method, path, {**TUS, **headers}, body)
        except OSError as error:
            self.answers[f"{method} {type(error).__name__}"] += 1
            return None
        self.answers[f"{method} {answer.status}"] += 1
        return None if answer.status in PASSING else answer

    def insist(self, method: str, path: str, headers: dict[str, str | int]) -> Response:
        """Come back until there is an answer that says more than that."""
        found: list[Response] = []

        def asked() -> bool:
            answer = self.ask(method, path, headers)
            found.extend([] if answer is None else [answer])
            return bool(found)

        wait_until(asked, f"an answer to {method} {path}")
        return found[0]

    def create(self, headers: dict[str, str | int], body: bytes = b"") -> tuple[str, int]:
        """Return the path of a new upload, and how many bytes were acknowledged."""
        while True:
            answer = self.ask("POST", "/files/", {**BYTES, **headers}, body)
            if answer is not None:
                assert answer.status == 201, answer
                return path_of(answer), int(answer.headers.get("upload-offset", 0))

    def expect(self, path: str, data: bytes) -> None:
        """See that every server has a finished upload, and the same."""
        for server in self.hosts.servers:
            body = server.client.get(path).body
            assert sha1(body) == sha1(data), f"{server.client.origin.host} has {path} otherwise"


@dataclass
class Kept:
    """Bytes that were acknowledged as one client's."""

    start: int
    stop: int
    mark: bytes


class Rivals(Job):
    """Some clients send different bytes to one upload, each to where it ends."""

    SIZE = 900_000

    def run(self) -> None:
        self.kept: list[Kept] = []
        self.told = 0
        first = bytes([9]) * self.random.choice([0, 1000, 60_000])
        self.path, offset = self.create({"Upload-Length": self.SIZE}, first)
        self.kept.append(Kept(0, offset, b"\x09"))
        with ThreadPoolExecutor(3) as pool:
            for one in [pool.submit(self._send_all, bytes([mark])) for mark in (1, 2, 3)]:
                one.result()
        self._verify()

    def _send_all(self, mark: bytes) -> None:
        while (offset := self._offset()) < self.SIZE:
            self._send(mark, offset)

    def _offset(self) -> int:
        answer = self.insist("HEAD", self.path, {})
        assert answer.status == 200, answer
        return answer.offset

    def _send(self, mark: bytes, offset: int) -> None:
        n = min(self.random.choice([10, 10_000, 100_000, 300_000]), self.SIZE - offset)
        way = self.random.choice(["length", "chunked", "checksum", "wrong checksum"])
        data = (GARBAGE if way == "wrong checksum" else mark) * n
        headers: dict[str, str | int] = {**BYTES, "Upload-Offset": offset}
        if way.endswith("checksum"):
            headers["Upload-Checksum"] = sha1(data if way == "checksum" else b"else")
        is_chunked = way == "chunked"
        headers |= {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": n}
        try:
            with self.connect() as connection:
                connection.send_head("PATCH", self.path, headers)
                for at in range(0, n, 50_000):
                    piece = data[at : at + 50_000]
                    connection.send(chunk(piece) if is_chunked else piece)
                    time.sleep(0.03)  # a network: there is time to be stopped in the middle
                if is_chunked:
                    connection.send(chunk(b""))
                answer = connection.read()
        except OSError as error:
            self.answers[f"PATCH {type(error).__name__}"] += 1
            return
        self.answers[f"PATCH {answer.status}"] += 1
        if answer.status == 204:
            assert way != "wrong checksum"
            self.kept.append(Kept(offset, answer.offset, mark))
        else:
            assert answer.status in PASSING

    def _verify(self) -> None:
        body = self.hosts.client().get(self.path).body
        assert len(body) == self.SIZE
        self.expect(self.path, body)
        assert set(body) <= {1, 2, 3, 9}, "bytes that nobody sent, or that were refused"
        reached = 0
        for one in sorted(self.kept, key=lambda one: (one.start, one.stop)):
            assert one.start >= reached, "two clients had the same bytes acknowledged"
            assert body[one.start : one.stop] == one.mark * (one.stop - one.start)
            reached = one.stop


class Concatenation(Job):
    """Parts become one upload, which is the same for everybody."""

    def run(self) -> None:
        parts = [content(size, self.random.random()) for size in (1, 700_000, 3_000_000)]
        paths = [self._part(part) for part in parts]
        order = self.random.sample(range(3), 3)
        urls = " ".join(paths[number] for number in order)
        answer = None
        while answer is None:
            answer = self.ask("POST", "/files/", {"Upload-Concat": f"final;{urls}"})
        # A part may have been too old when it was finished.
        if answer.status == 201:
            final = path_of(answer)
            wanted = b"".join(parts[number] for number in order)
            wait_until(lambda: self._is_built(final, len(wanted)), "a final upload")
            self.expect(final, wanted)
        else:
            assert answer.status in (404, 410), answer

    def _part(self, data: bytes) -> str:
        headers: dict[str, str | int] = {"Upload-Concat": "partial", "Upload-Length": len(data)}
        path, offset = self.create(headers, data)
        while offset < len(data):
            self.ask("PATCH", path, {**BYTES, "Upload-Offset": offset}, data[offset:])
            answer = self.insist("HEAD", path, {})
            if answer.status != 200:
                break
            offset = answer.offset
        return path

    def _is_built(self, path: str, size: int) -> bool:
        answer = self.ask("HEAD", path, {})
        return answer is not None and answer.headers.get("upload-offset") == str(size)


class Termination(Job):
    """What was terminated never comes back, and what was not keeps its bytes."""

    def run(self) -> None:
        data = content(200_000, self.random.random())
        path, offset = self.create({"Upload-Length": len(data)}, data[:100_000])
        answer = None
        while answer is None:
            head = self.insist("HEAD", path, {})
            if head.status == 410:
                return  # the answer to an earlier DELETE was lost
            assert head.offset >= offset
            answer = self.ask("DELETE", path, {})
        assert answer.status in (204, 410)
        for server in self.hosts.servers:
            gone = server.client.head(path)
            assert gone.status in (410, 423, 503), gone


class Ageing(Job):
    """The clean-up removes partial uploads that are old, and none that just got bytes."""

    def run(self) -> None:
        path, offset = self.create({"Upload-Concat": "partial", "Upload-Length": 10_000_000})
        kept_at = time.monotonic()
        for _ in range(4):
            time.sleep(self.random.uniform(0.0, 1.4 * PARTIAL_AGE))
            answer = self.ask("PATCH", path, {**BYTES, "Upload-Offset": offset}, b"x" * 1000)
            if answer is not None and answer.status == 204:
                offset, kept_at = answer.offset, time.monotonic()
            head = self.ask("HEAD", path, {})
            if head is None:
                continue
            if head.status == 410:
                # Asked before the age was over, counted from the answer, it must be there.
                assert time.monotonic() - kept_at > PARTIAL_AGE / 2 or answer is None
                return
            assert head.offset >= offset
            offset = head.offset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pause", "rounds"),
    # A lease of etcd lasts for at least two seconds.
    [(with_redis, 1.6, 80), (with_postgres, 1.6, 80), (with_etcd, 3.2, 40)],
)
def test_nothing_is_lost_when_hosts_stand_still(
    tmp_path: Path, kind: Callable[..., AbstractContextManager[Hosts]], pause: float, rounds: int
) -> None:
    clean_up = ("--gc-partial-age", f"{PARTIAL_AGE}s", "--gc-interval", "1s")
    classes = [Rivals, Rivals, Rivals, Concatenation, Concatenation, Termination, Ageing]
    is_over, is_calm = threading.Event(), threading.Event()
    servers = kind(tmp_path, pause, "--remove-parts", *clean_up)
    with servers as shared, ThreadPoolExecutor(8) as pool:
        jobs = [one(shared, seed) for seed, one in enumerate(classes)]
        working = [pool.submit(job.run_until, is_over) for job in jobs]
        waker = pool.submit(shared.wake, is_calm)
        try:
            for _ in range(rounds):
                shared.stop_one()
                # It ends only if it fails, and says so below.
                seconds = pause * random.uniform(1.0, 2.0)
                if wait([*working, waker], seconds, FIRST_COMPLETED).done:
                    break
        finally:
            is_over.set()
            wait(working)
            is_calm.set()
            print(f"servers stood still {waker.result()} times")
            for job in jobs:
                print(type(job).__name__, job.done, dict(job.answers))
        for one in working:
            one.result()
        sealed = sum(server.log.count("may still write") for server in shared.servers)
        print(f"{sealed} uploads were taken over from hosts that stood still")
        assert sealed, "nobody was ever stopped while it had a lock"
