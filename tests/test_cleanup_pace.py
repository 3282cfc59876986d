"""The clean-up of many uploads leaves the worker to its requests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Looks through many uploads while another greenlet ticks. How long one may wait depends on
#: the machine, so that is compared with the time that the same records take in one piece.
LOOKING = """
from gevent import monkey; monkey.patch_all()
import sys, time
import gevent
from tuswsgi.app import Tus
from tuswsgi.info import FileInfo, State, new_id
from tuswsgi.protocol.cleanup import CleanUp
from tuswsgi.protocol.settings import CleanUpSettings
from tuswsgi.process import let_others_run

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

began = time.monotonic()
for info in uploads.infos.scan(State.FINISHED):
    pass
whole = time.monotonic() - began

pauses = []

def tick():
    last = time.monotonic()
    while True:
        let_others_run()
        now = time.monotonic()
        pauses.append(now - last)
        last = now

looked = 0

def look():
    global looked
    looked += 1

settings = CleanUpSettings(finished_age=3600.0, unfinished_age=3600.0)
ticker = gevent.spawn(tick)
searches = CleanUp(uploads, settings, on_look=look).searches()
assert [removal for search in searches for removal in search.removals()] == []
ticker.kill()
assert looked >= COUNT, looked
print(f"{looked} looked at, {whole:.2f} s; longest pause {max(pauses):.4f} s of {len(pauses)}")
assert len(pauses) > COUNT / 200, len(pauses)
assert max(pauses) < whole / 4, (max(pauses), whole)
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
