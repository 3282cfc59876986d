"""Who is measured when: each workload in rounds, and in each round one server after the other.

What disturbs the machine for a while then disturbs all of them. Each server of a workload has
a fresh directory and is warmed up by a small round that does not count.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.peers import Certificate, Launch, Peer, Server, Unavailable
from tests.bench.wire import Failed, Unsupported
from tests.bench.workloads import Sample, Workload

#: How much smaller than a round its warm-up is.
WARM_UP = 1 / 8


@dataclass
class Result:
    """What one server reached in one workload, or why it did not."""

    workload: Workload
    server: str
    samples: list[Sample] = field(default_factory=list)
    missing: str = ""


@dataclass(frozen=True)
class Step:
    """One server in one round, or in the warm-up before the first one."""

    bench: _Bench
    peer: Peer
    result: Result
    warm_up: bool

    def __str__(self) -> str:
        return f"{self.result.workload.key}: {self.peer.name}"

    def run(self) -> None:
        """Take the step. A server that fails once is left out of the workload."""
        if self.result.missing:
            return
        try:
            if self.warm_up:
                self.bench.warm_up(self.peer)
            else:
                self.result.samples.append(self.bench.measure(self.peer))
        except (Failed, Unavailable, OSError) as error:
            # Half of the rounds are not a result.
            self.result.samples.clear()
            self.result.missing = str(error) or type(error).__name__


@dataclass(frozen=True)
class Plan:
    """What is to be run, and where."""

    workloads: Sequence[Workload]
    peers: Sequence[Peer]
    rounds: int
    directory: Path
    disk: Path
    certificate: Certificate | None
    results: list[Result] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.workloads) * len(self.peers) * (self.rounds + 1)

    def steps(self) -> Generator[Step, None, None]:
        """Yield what is to be done, one after the other; servers run in between."""
        for workload in self.workloads:
            results = {peer: Result(workload, peer.name) for peer in self.peers}
            self.results.extend(results.values())
            directory = (self.disk if workload.on_disk else self.directory) / workload.key
            with ExitStack() as stack:
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                bench = _Bench(workload, directory, self.certificate, stack)
                for number in range(self.rounds + 1):
                    for peer in _rotated(self.peers, number):
                        yield Step(bench, peer, results[peer], warm_up=number == 0)


class _Bench:
    """The servers of one workload, each started when it is needed first."""

    def __init__(
        self, workload: Workload, directory: Path, certificate: Certificate | None, stack: ExitStack
    ) -> None:
        self._workload = workload
        self._directory = directory
        self._certificate = certificate
        self._stack = stack
        self._servers: dict[Peer, Server] = {}
        self._launches = 0

    def measure(self, peer: Peer) -> Sample:
        """Run one round on one server."""
        if self._workload.restart:
            with peer.start(self._launch()) as server:
                return self._workload.run(server)
        return self._workload.run(self._server(peer))

    def warm_up(self, peer: Peer) -> None:
        """Run a small round on a server that will be measured later."""
        if not self._workload.restart:
            scale = self._workload.scale * WARM_UP
            dataclasses.replace(self._workload, scale=scale).run(self._server(peer))

    def _server(self, peer: Peer) -> Server:
        if peer not in self._servers:
            server = self._stack.enter_context(peer.start(self._launch()))
            extension = self._workload.extension
            if extension and extension not in server.extensions():
                raise Unsupported(f"It has no {extension}.")
            self._servers[peer] = server
        return self._servers[peer]

    def _launch(self) -> Launch:
        if self._workload.tls and self._certificate is None:
            raise Unavailable("There is no openssl to make a certificate with.")
        self._launches += 1
        directory = self._directory / str(self._launches)
        certificate = self._certificate if self._workload.tls else None
        return Launch(directory, self._workload.workers, certificate)


def _rotated(peers: Sequence[Peer], number: int) -> list[Peer]:
    start = number % len(peers)
    return [*peers[start:], *peers[:start]]
