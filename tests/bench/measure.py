"""What a load costs: time, the processor's seconds and memory, of a server and all its children.

All of it comes from /proc, so that it is the same for whatever language a server is in.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


class Meter:
    """Measures what happens within a ``with`` block.

    ``seconds`` is its duration, ``cpu`` what the server's processes spent in it (None if they
    are unknown), and ``load`` how much of one processor the load generator needed itself.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self.seconds = 0.0
        self.cpu: float | None = None
        self.load = 0.0

    def __enter__(self) -> Meter:
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._read()
        self.seconds = end[0] - self._start[0]
        self.cpu = end[1] - self._start[1] if self._pids else None
        self.load = (end[2] - self._start[2]) / self.seconds

    def _read(self) -> tuple[float, float, float]:
        return time.perf_counter(), cpu_seconds(self._pids), _own_cpu_seconds()


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return what processes and their descendants have spent so far, also those that ended."""
    ticks = 0
    for pid in _family(pids):
        # utime, stime, and those of the children that it has waited for
        ticks += sum(map(int, _stat(pid)[11:15]))
    return ticks / _TICK


def memory(pids: Sequence[int]) -> int:
    """Return the bytes of memory of processes and their descendants.

    What they share is counted once: it is the proportional set size. Where that cannot be
    read it is the resident set size, which counts it for each.
    """
    return sum(map(_memory, _family(pids)))


def spread(values: Sequence[float]) -> float:
    """Return half of the distance between the extremes, as a share of the median."""
    median = statistics.median(values)
    return (max(values) - min(values)) / 2 / median if median else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _own_cpu_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _family(pids: Sequence[int]) -> set[int]:
    family = set(pids)
    if not family:
        return family
    parents = {int(path.name): _parent(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return family


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """Return the fields of a process after its name, or zeros if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["0"] * 20


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        pass
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
