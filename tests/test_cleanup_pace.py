"""The clean-up of many uploads leaves the worker to its requests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Looks through many uploads while another greenlet ticks. How long that one waits depends on the
#: machine, so it is counted how many records are read between two of its turns.
LOOKING = """
from gevent import monkey; monkey.patch_all()
import sys, time
import gevent
from tuswsgi.app import Tus
from tuswsgi.core.info import FileInfo, State, new_id
from tuswsgi.infostores import record
from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings
from tuswsgi.core.process import let_others_run

COUNT = 20_000
tus = Tus(data_dir=sys.argv[1], info_storage=sys.argv[2])
uploads = tus.uploads
for backend in (uploads.data, uploads.infos, uploads.locker):
    backend.prepare()

def write(ids):
    for id in ids:
        uploads.infos.create(
            FileInfo(
                id=id, state=State.FINISHED, finished_at=time.time(), created_at=float(sys.argv[3])
            )
        )

ids = [new_id() for _ in range(COUNT)]
gevent.joinall([gevent.spawn(write, ids[n::100]) for n in range(100)], raise_error=True)

looked, read, turns = 0, 0, []

def counting(data, load=record.load):
    global read
    read += 1
    return load(data)

record.load = counting

def tick():
    last = 0
    while True:
        let_others_run()
        turns.append(read - last)
        last = read

def look():
    global looked
    looked += 1

settings = CleanUpSettings(finished_age=3600.0, unfinished_age=3600.0)
ticker = gevent.spawn(tick)
searches = CleanUp(uploads, settings, on_look=look).searches()
assert [removal for search in searches for removal in search.removals()] == []
ticker.kill()
assert looked >= COUNT, looked
print(f"{looked} looked at; {max(turns)} of {read} read between two of {len(turns)} turns")
assert read >= COUNT, read
assert len(turns) > COUNT / 200, len(turns)
assert max(turns) <= 300, max(turns)
"""


#: Records that were taken over from another server are older than their ids seem to be: the
#: search for strays then looks through all of them for one of this server's own.
@pytest.mark.parametrize(
    ("store", "are_foreign"), [("db-info-storage", True), ("file-info-storage", False)]
)
def test_it_lets_others_run(tmp_path: Path, store: str, are_foreign: bool) -> None:
    created_at = 1.0 if are_foreign else time.time()
    command = [sys.executable, "-c", LOOKING, str(tmp_path / "data"), store, str(created_at)]
    subprocess.run(command, check=True, timeout=240, cwd=ROOT)
