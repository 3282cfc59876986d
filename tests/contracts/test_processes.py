"""What the contracts promise among processes: exclusion, takeover, death, forks, gevent."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import stores

from tuswsgi.core.errors import InfoConflict, UploadLocked
from tuswsgi.lockers.file import FileLocker
from tuswsgi.testing.lockers import SOON, Requests, ignore
from tuswsgi.testing.records import event, upload

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Child:
    """Another process that runs `target(connection, *args)`."""

    def __init__(self, target, *args):
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, message):
        self._connection.send(message)

    def hear(self):
        assert self._connection.poll(SOON * 3), "the child says nothing"
        return self._connection.recv()

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        if self.process.is_alive():
            self.kill()
        self._connection.close()
        self.process.close()


@contextmanager
def children(count, target, *args):
    started = [Child(target, *args) for _ in range(count)]
    try:
        for child in started:
            assert child.hear() == "ready"
        yield started
    finally:
        for child in started:
            child.end()


def run_python(code, *args):
    """Run a script in a new interpreter, which reports a failure by an exception."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run_tests_under_gevent(*args):
    """Run tests beside this one in a new interpreter that gevent has patched.

    In that process itself: what pytest-xdist starts would not be patched.
    """
    run_python(
        "from gevent import monkey; monkey.patch_all()\n"
        "import sys, pytest\n"
        "sys.exit(pytest.main(['-q', '-x', '-n', '0', '-p', 'no:cacheprovider', *sys.argv[1:]]))",
        *args,
    )


def take_turns(connection, directory, count):
    locker, marker = FileLocker(directory), str(directory / "inside")
    locker.prepare()
    connection.send("ready")
    connection.recv()
    turns = 0
    while turns < count:
        try:
            # Without the base class' pauses: opening, locking and unlinking must race.
            with locker.try_lock("a", ignore):
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.unlink(marker)
                turns += 1
        except UploadLocked:
            time.sleep(0)
    connection.send(turns)


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    with children(4, take_turns, tmp_path, 300) as holders:
        for child in holders:
            child.tell("go")
        assert [child.hear() for child in holders] == [300] * 4


def hold(connection, directory, ids, *, obedient=True):
    locker = FileLocker(directory)
    locker.prepare()
    connection.send("ready")
    while True:
        connection.recv()
        requests = [Requests() for _ in ids]
        first, *others = [
            locker.lock(id, request) for id, request in zip(ids, requests, strict=True)
        ]
        for other in others:
            other.__enter__()
        with first:
            connection.send("holding")
            requests[0].wait()
            if not obedient:
                connection.recv()


def test_a_holder_in_another_process_lets_go(tmp_path):
    locker = FileLocker(tmp_path)
    latencies = []
    with children(1, hold, tmp_path, ["a"]) as [holder]:
        for _ in range(5):
            holder.tell("lock")
            assert holder.hear() == "holding"
            start = time.monotonic()
            with locker.lock("a", ignore):
                latencies.append(time.monotonic() - start)
    locker.close()
    assert statistics.median(latencies) < 0.1


def test_the_death_of_a_holder_frees_its_locks(tmp_path):
    locker = FileLocker(tmp_path)
    with children(1, hold, tmp_path, ["a", "b"]) as [holder]:
        holder.tell("lock")
        assert holder.hear() == "holding"
        with pytest.raises(UploadLocked), locker.try_lock("b", ignore):
            pytest.fail("two holders")
        holder.kill()
    with locker.try_lock("a", ignore):
        pass
    locker.close()
    assert len(list(tmp_path.glob("*.sock"))) == 1
    (tmp_path / "foreign").write_text("somebody's own file")
    locker.prepare()
    assert list(tmp_path.glob("*.sock")) == []
    assert (tmp_path / "foreign").exists()


FORK = """
import os, sys
from pathlib import Path
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
from tuswsgi.lockers.file import FileLocker
from tuswsgi.testing.lockers import LockerContract, Requests, ignore

locker = FileLocker(Path(sys.argv[2]))
locker.prepare()
LockerContract._flush(locker)
(socket,) = locker.directory.glob("*.sock")
for _ in range(3):
    child = os.fork()
    if child == 0:
        LockerContract._flush(locker)
        locker.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert socket.exists()
    LockerContract._flush(locker)
assert list(locker.directory.glob("*.sock")) == [socket]
locker.close()
assert not list(locker.directory.glob("*.sock"))
"""


FORK_WITH_WATCHER = """
from gevent import monkey; monkey.patch_all()
import os, signal, sys, time
from pathlib import Path
from tuswsgi.lockers.file import FileLocker
from tuswsgi.testing.lockers import LockerContract, Requests, ignore

locker = FileLocker(Path(sys.argv[1]), lock_timeout=0.01)
locker.prepare()
LockerContract._flush(locker)
child = os.fork()
if child == 0:
    while True:
        time.sleep(0.001)
block = monkey.get_original("time", "sleep")
lost = 0
for _ in range(10):
    requests = Requests()
    with locker.lock("a", requests):
        locker._request_release("a")
        block(0.02)  # the child has the first chance to receive it
        lost += not requests._arrived.wait(0.2)
os.kill(child, signal.SIGKILL)
assert lost <= 1, lost
"""


def test_a_forked_watcher_takes_no_requests_away(tmp_path):
    # Under gevent the parent's greenlets live on in a child. It notices at the first
    # request; the base class asks again anyway.
    run_python(FORK_WITH_WATCHER, tmp_path)


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_a_forked_child_has_its_own_mailbox(tmp_path, kind):
    run_python(FORK, kind, tmp_path)


def write_much(connection, make, directory):
    store = make(directory)
    connection.send("ready")
    connection.recv()
    store.prepare()
    for _ in range(20):
        info = upload()
        store.create(info, [event(info)])
        store.save(info, [event(info)])
    for _ in range(20):
        while True:
            shared = store.load("shared")
            try:
                store.save(replace(shared, offset=shared.offset + 1), [event(shared)])
                break
            except InfoConflict:
                pass
    connection.send(store.load("shared").offset)


def test_many_processes_write_at_once(tmp_path, make):
    store = make(tmp_path)
    with children(4, write_much, make, tmp_path) as writers:
        store.prepare()
        store.create(upload("shared"))
        for child in writers:
            child.tell("go")
        assert max(child.hear() for child in writers) == 80
    for info in store.list():
        assert info.sequence == (80 if info.id == "shared" else 1)
        assert len(store.events(info.id)) == (80 if info.id == "shared" else 2)
    assert len(store.list()) == 81
    store.close()


@pytest.mark.parametrize("make", stores.SQL, indirect=True)
def test_tables_are_made_once(tmp_path, make):
    with children(4, make_tables, make, tmp_path) as makers:
        for child in makers:
            child.tell("go")
        assert [child.hear() for child in makers] == [[]] * 4


def make_tables(connection, make, directory):
    store = make(directory)
    connection.send("ready")
    connection.recv()
    store.prepare()
    connection.send(list(store.list()))


def write_for_ever(connection, make, directory):
    store = make(directory)
    store.prepare()
    connection.send("ready")
    info = upload()
    store.create(info, [event(info)])
    while True:
        info = store.save(info, [event(info), event(info)])
        connection.send((info.id, info.sequence))


@pytest.mark.parametrize("make", stores.MAKERS, indirect=True)
def test_the_death_of_a_writer_keeps_records_and_events_together(tmp_path, make):
    store = make(tmp_path)
    store.prepare()
    for writes in (5, 20, 60):
        with children(2, write_for_ever, make, tmp_path) as writers:
            for _ in range(writes):
                told = [child.hear() for child in writers]
            for child in writers:
                child.kill()
        for id, sequence in told:
            info = store.load(id)
            assert info.sequence >= sequence
            assert len(store.events(id)) == 1 + 2 * info.sequence
    assert len(store.list()) == 6
    store.close()


FORK_STORE = """
import os, sys
if sys.argv[1] == "gevent":
    from gevent import monkey; monkey.patch_all()
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.records import upload

store = SqlInfoStore(sys.argv[2])
store.prepare()
store.create(upload("parent"))
for n in range(3):
    child = os.fork()
    if child == 0:
        store.create(upload(f"child{n}"))
        store.load("parent")
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    store.create(upload(f"parent{n}"))
    store.load(f"child{n}")
assert len(store.list()) == 7
"""


@pytest.mark.parametrize("kind", ["threads", "gevent"])
@pytest.mark.parametrize("make", stores.SQL, indirect=True)
def test_a_forked_child_has_its_own_connections(tmp_path, make, kind):
    run_python(FORK_STORE, kind, make(tmp_path).info_db_dsn)


@pytest.mark.parametrize(
    "tests",
    [
        ["test_infostores.py", "test_lockers.py"],
        # What several do at once; all of it takes long.
        ["test_sql_servers.py", "-k", "at_once or exclude or creators or instances or while"],
    ],
    ids=["here", "servers"],
)
def test_the_contracts_hold_under_gevent(tests):
    run_tests_under_gevent(*tests)


BUSY = """
from gevent import monkey; monkey.patch_all()
import sqlite3, subprocess, sys, time
import gevent
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.records import event, upload

path = sys.argv[1]
store = SqlInfoStore("sqlite:///" + path)
store.prepare()
known = upload()
store.create(known)
foreign = subprocess.Popen(
    [sys.executable, "-c", '''
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(0.5)
connection.execute("COMMIT")
''', path],
    stdout=subprocess.PIPE,
)
gaps = []
def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.005)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
assert foreign.stdout.readline() == b"locked\\n"
start = time.monotonic()
ticker = gevent.spawn(tick)
writers = [gevent.spawn(store.create, info := upload(), [event(info)]) for _ in range(20)]
gevent.sleep(0.05)
store.load(known.id)
assert not any(writer.ready() for writer in writers)
gevent.joinall(writers, raise_error=True)
assert time.monotonic() - start > 0.3
assert max(gaps) < 0.2, max(gaps)
assert len(store.list()) == 21
foreign.wait()
foreign.stdout.close()
"""


def test_a_foreign_writer_does_not_block_the_hub(tmp_path):
    run_python(BUSY, tmp_path / "info.sqlite3")


#: Ends the greenlet that commits, for itself and for others, in the middle of that: as a worker
#: ends its requests when `graceful_timeout` is over.
STRUCK = """
from gevent import monkey; monkey.patch_all()
import sys
import gevent
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.records import event, upload

block = monkey.get_original("threading", "Event")
store = SqlInfoStore("sqlite:///" + sys.argv[1], force_fsync=True)
store.prepare()
store.create(upload())
database = store._connection._handles.get().writer._database
execute, reached, goes_on = database.execute_sql, block(), block()

def slow(sql, params=None):
    if sql == "COMMIT":
        reached.set()
        assert goes_on.wait(60)
    return execute(sql, params)

database.execute_sql = slow
infos = [upload() for _ in range(5)]
leader, *others = [gevent.spawn(store.create, info, [event(info)]) for info in infos]
while not reached.is_set():
    gevent.sleep(0.001)
for _ in range(int(sys.argv[2])):
    leader.kill(block=False)
    gevent.sleep(0.01)
assert not leader.ready() and not any(other.ready() for other in others)
goes_on.set()
gevent.joinall([leader, *others], timeout=60)
assert isinstance(leader.value, gevent.GreenletExit), leader.exception
for other in others:
    other.get()
assert all(store.load(info.id) == info for info in infos)
store.create(info := upload())
assert store.load(info.id) == info
"""


@pytest.mark.parametrize("blows", [1, 3])
def test_what_is_committed_is_no_failure_where_who_commits_is_ended(tmp_path, blows):
    run_python(STRUCK, tmp_path / "info.sqlite3", blows)
