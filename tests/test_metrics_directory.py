"""The directory where processes count: what they leave to each other, alive and dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: A worker: it takes a number, tells what lies in the directory, and waits for its end.
WORKER = """
import sys
from pathlib import Path
from tuswsgi.observing import metrics_directory
number = metrics_directory.slot()
files = Path(sys.argv[1]).glob(f"*_{number}.db")
print(number, *sorted(file.name for file in files if file.stat().st_size), flush=True)
sys.stdin.read()
"""


class Worker:
    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory)],
            env={"PROMETHEUS_MULTIPROC_DIR": str(directory), "PYTHONPATH": ":".join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        number, *self.files = self._process.stdout.readline().split()
        self.number = int(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_files_are_whole_before_anything_is_counted(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    assert worker.files == ["counter_0.db", "gauge_livesum_0.db", "histogram_0.db"]
    worker.kill()


def test_a_number_is_taken_over_from_the_dead_only(tmp_path: Path) -> None:
    workers = [Worker(tmp_path) for _ in range(3)]
    assert [worker.number for worker in workers] == [0, 1, 2]
    workers[1].kill()
    (tmp_path / "counter_1.db").write_bytes(b"counted")
    (tmp_path / "gauge_livesum_1.db").write_bytes(b"was true")
    workers[1] = Worker(tmp_path)
    assert workers[1].number == 1
    assert (tmp_path / "counter_1.db").read_bytes() == b"counted"
    assert not (tmp_path / "gauge_livesum_1.db").read_bytes().strip(b"\0")
    for worker in workers:
        worker.kill()
