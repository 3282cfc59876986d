"""What is measured: one class for each row of the table.

A workload prepares its uploads, measures one round, and gives up the disk that it used. It
keeps nothing between rounds. ``scale`` makes it smaller.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from tests.bench import load
from tests.bench.measure import Meter, percentile
from tests.bench.peers import Server
from tests.bench.wire import Failed, Unsupported

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB


class Sample(NamedTuple):
    """What one round measured: the result, the CPU per unit and the load generator's share.

    :ivar bound: what the result would be if nothing but ``Workload.bound`` were done.
    """

    value: float
    cpu: float | None
    load: float
    bound: float | None = None


@dataclass(frozen=True)
class Workload(ABC):
    """One row of the table."""

    scale: float = 1.0

    #: The word that chooses it.
    key: ClassVar[str]
    unit: ClassVar[str]
    more_is_better: ClassVar[bool] = True
    #: What the CPU is compared by, if it is.
    cpu_unit: ClassVar[str] = ""
    #: What bounds the result, and is measured beside it.
    bound: ClassVar[str] = ""
    #: How many processes of ours serve it.
    workers: ClassVar[int] = 2
    tls: ClassVar[bool] = False
    #: Whether uploads are kept on a disk; otherwise they are where all the others are.
    on_disk: ClassVar[bool] = False
    #: Whether each round wants a server that has done nothing yet.
    restart: ClassVar[bool] = False
    #: What ``Tus-Extension`` must name for it.
    extension: ClassVar[str] = ""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it does, with the sizes that it does it in."""

    @abstractmethod
    def run(self, server: Server) -> Sample:
        """Measure one round."""

    def _scaled(self, size: int) -> int:
        return max(KiB, int(size * self.scale))

    def _seconds(self, seconds: float) -> float:
        return max(0.25, seconds * self.scale)


class _Bulk(Workload):
    """Many bytes, compared by MB/s and by CPU seconds per GiB."""

    unit = "MB/s"
    cpu_unit = "s/GiB"
    streams: ClassVar[int] = 1
    size: ClassVar[int]

    @property
    def each(self) -> int:
        return self._scaled(self.size)

    def run(self, server: Server) -> Sample:
        uploads = load.create(server.target, self.each, self.streams)
        with server.meter() as meter:
            self._move(server, uploads)
        server.release(uploads)
        return self._sample(meter)

    def _move(self, server: Server, uploads: Sequence[load.Upload]) -> None:
        load.send(server.target, uploads)

    def _sample(self, meter: Meter) -> Sample:
        size = self.each * self.streams
        return Sample(size / 1e6 / meter.seconds, _per(meter.cpu, size / GiB), meter.load)


class OnePatch(_Bulk):
    """One after the other: which processor does what changes from one to the next, and with it
    the result, so that one alone says little.
    """

    key = "patch"
    size = GiB
    streams = 3

    @property
    def title(self) -> str:
        return f"one PATCH of {_size(self.each)}"

    def _move(self, server: Server, uploads: Sequence[load.Upload]) -> None:
        for upload in uploads:
            load.send(server.target, [upload])


class ManyPatches(_Bulk):
    key = "streams"
    streams = 64
    size = 16 * MiB

    @property
    def title(self) -> str:
        return f"{self.streams} streams of {_size(self.each)}"


class PacedPatches(_Bulk):
    """Streams as networks deliver them; all servers keep up, and differ in what it costs."""

    key = "paced"
    unit = "CPU s/GiB"
    cpu_unit = ""
    more_is_better = False
    streams = 8
    size = 64 * MiB
    rate: ClassVar[float] = 10e6

    @property
    def title(self) -> str:
        return f"{self.streams} streams paced at {self.rate / 1e6:.0f} MB/s"

    def _move(self, server: Server, uploads: Sequence[load.Upload]) -> None:
        load.send_paced(server.target, uploads, self.rate)

    def _sample(self, meter: Meter) -> Sample:
        sample = super()._sample(meter)
        if sample.cpu is None:
            raise Unsupported("Its processes are unknown (--peer-pid).")
        return sample._replace(value=sample.cpu)


class EncryptedPatch(_Bulk):
    key = "tls"
    size = 512 * MiB
    tls = True

    @property
    def title(self) -> str:
        return f"TLS upload of {_size(self.each)}"


class ChecksummedPatch(_Bulk):
    """What is verified: no faster than its hash, which is measured in the same round."""

    key = "checksum"
    size = 512 * MiB
    bound = "SHA-1 alone"
    extension = "checksum"

    @property
    def title(self) -> str:
        return f"checksummed PATCH of {_size(self.each)}"

    def run(self, server: Server) -> Sample:
        checksum, seconds = load.checksum(self.each)
        uploads = [
            upload._replace(headers={"Upload-Checksum": checksum})
            for upload in load.create(server.target, self.each)
        ]
        with server.meter() as meter:
            load.send(server.target, uploads)
        server.release(uploads)
        return self._sample(meter)._replace(bound=self.each / 1e6 / seconds)


class Download(_Bulk):
    key = "get"
    size = GiB

    @property
    def title(self) -> str:
        return f"GET of {_size(self.each)}"

    def run(self, server: Server) -> Sample:
        uploads = load.create(server.target, self.each)
        load.send(server.target, uploads)
        with server.meter() as meter:
            load.download(server.target, uploads[0])
        server.release(uploads)
        return self._sample(meter)


class DownloadFromDisk(Download):
    """A download of an upload that is not in memory."""

    key = "get-disk"
    on_disk = True

    @property
    def title(self) -> str:
        return f"{super().title} from a disk"

    def run(self, server: Server) -> Sample:
        uploads = load.create(server.target, self.each)
        load.send(server.target, uploads)
        server.evict(uploads)
        with server.meter() as meter:
            load.download(server.target, uploads[0])
        server.release(uploads)
        return self._sample(meter)


class Concatenation(Workload):
    key = "concat"
    unit = "ms"
    more_is_better = False
    cpu_unit = "s/GiB"
    extension = "concatenation"
    parts: ClassVar[int] = 4
    size: ClassVar[int] = 256 * MiB

    @property
    def title(self) -> str:
        return f"concatenation of {self.parts} x {_size(self._scaled(self.size))}"

    def run(self, server: Server) -> Sample:
        size = self._scaled(self.size)
        parts = load.create(server.target, size, self.parts, Upload_Concat="partial")
        load.send(server.target, parts)
        with server.meter() as meter:
            final = load.concatenate(server.target, parts)
        server.release([*parts, final])
        return Sample(meter.seconds * 1e3, _per(meter.cpu, final.size / GiB), meter.load)


class SlowConnections(Workload):
    """What a connection costs that is open and hardly sends."""

    key = "slow"
    unit = "KiB per connection"
    more_is_better = False
    restart = True

    @property
    def connections(self) -> int:
        return max(50, int(2000 * self.scale))

    @property
    def title(self) -> str:
        return f"{self.connections:,} connections at 1 byte/s, memory"

    def run(self, server: Server) -> Sample:
        if not server.pids:
            raise Unsupported("Its processes are unknown (--peer-pid).")
        seconds = max(1.0, 10 * self.scale)
        # What is loaded and allocated for the first of them is not theirs alone.
        with load.trickling(server.target, load.create(server.target, MiB, 16), 1):
            pass
        uploads = load.create(server.target, MiB, self.connections)
        before = server.memory()
        with server.meter() as meter, load.trickling(server.target, uploads, seconds):
            grown = server.memory() - before
        return Sample(grown / KiB / self.connections, None, meter.load)


class _Small(Workload):
    """Small requests, compared by requests per second and by CPU per request."""

    unit = "requests/s"
    cpu_unit = "us/request"
    connections: ClassVar[int] = 16
    seconds: ClassVar[float] = 4
    statuses: ClassVar[tuple[int, ...]]

    def run(self, server: Server) -> Sample:
        requests = self._requests(server)
        with server.meter() as meter:
            count = load.repeat(
                server.target, requests, self._seconds(self.seconds), *self.statuses
            )
        if not count:
            raise Failed("No request was answered.")
        return Sample(count / meter.seconds, _per(meter.cpu, count / 1e6), meter.load)

    @abstractmethod
    def _requests(self, server: Server) -> list[bytes]:
        """Return a request for each connection."""


class SmallPosts(_Small):
    key = "post"
    statuses = (201,)
    extension = "creation-with-upload"

    @property
    def title(self) -> str:
        return f"POST with 1 KiB and metadata, {self.connections} connections"

    def _requests(self, server: Server) -> list[bytes]:
        request = server.target.post(bytes(KiB), **load.METADATA)
        if server.target.ask(request, 201).header("Upload-Offset") != str(KiB):
            raise Unsupported("The content of a POST is not kept.")
        return [request] * self.connections


class Heads(_Small):
    key = "head"
    statuses = (200, 204)
    # tusd leaves a descriptor open for each, until its garbage is collected: it runs out of them
    # where it is asked for long.
    restart = True
    seconds = 1.5

    @property
    def title(self) -> str:
        return f"HEAD, {self.connections} connections"

    def _requests(self, server: Server) -> list[bytes]:
        # Each connection has an upload of its own, so that none waits for another one's lock.
        uploads = load.create(server.target, KiB, self.connections)
        return [server.target.request("HEAD", upload.path) for upload in uploads]


class HeadsBesidePatches(Workload):
    """How long small requests wait for big ones in the same process."""

    key = "latency"
    unit = "ms"
    more_is_better = False
    workers = 1
    patches: ClassVar[int] = 4
    size: ClassVar[int] = 512 * MiB

    @property
    def title(self) -> str:
        return f"HEAD beside {self.patches} unpaced PATCHes in one worker, p99"

    def run(self, server: Server) -> Sample:
        idle = load.create(server.target, KiB)[0]
        request = server.target.request("HEAD", idle.path)
        uploads = load.create(server.target, self._scaled(self.size), self.patches)
        with server.meter() as meter, load.sending(server.target, uploads) as busy:
            time.sleep(0.02)
            times = load.latencies(server.target, request, 0.001, busy, 200, 204)
        server.release(uploads)
        return Sample(percentile(times, 0.99) * 1e3, None, meter.load)


#: By their key, in the order of the table.
WORKLOADS: dict[str, type[Workload]] = {
    workload.key: workload
    for workload in (
        OnePatch,
        ManyPatches,
        PacedPatches,
        ChecksummedPatch,
        Download,
        DownloadFromDisk,
        SlowConnections,
        SmallPosts,
        Heads,
        EncryptedPatch,
        Concatenation,
        HeadsBesidePatches,
    )
}


def _per(cpu: float | None, units: float) -> float | None:
    return None if cpu is None else cpu / units


def _size(size: int) -> str:
    for unit, name in ((GiB, "GiB"), (MiB, "MiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size / KiB:g} KiB"
