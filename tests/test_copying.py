"""``tuswsgi info copy``: all that an info store knows arrives in another one, or it is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import databases
import pytest
from click.testing import CliRunner
from private_servers import PrivateRedis

from tuswsgi.commands.cli import main
from tuswsgi.commands.copy import Copy, StoredUploads
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.file import FileInfoStore
from tuswsgi.testing.records import event, full, upload


@contextmanager
def private_redis() -> Iterator[str]:
    server = PrivateRedis()
    yield server.dsn
    server.remove()


SERVERS = {"postgres": databases.postgres, "mysql": databases.mysql, "redis": private_redis}

#: Each kind of store once on either side.
WAYS = [
    ("sqlite", "file"),
    ("file", "postgres"),
    ("postgres", "mysql"),
    ("mysql", "redis"),
    ("redis", "sqlite"),
]

PATIENCE = 60.0

#: How many uploads take long enough to copy that somebody can interrupt it.
COUNT = 500


@contextmanager
def place(kind: str, directory: Path) -> Iterator[str]:
    """Yield the DSN of an empty store."""
    if kind in SERVERS:
        with SERVERS[kind]() as dsn:
            yield dsn
    elif kind == "sqlite":
        yield f"sqlite:///{directory}/info.sqlite3"
    else:
        yield f"file://{directory}/info"


@contextmanager
def opened(dsn: str) -> Iterator[InfoStore]:
    store = Backends(Config.load()).info_store_at(dsn)
    store.prepare()
    yield store
    store.close()


@pytest.fixture(params=WAYS, ids="-to-".join)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The DSNs of two stores."""
    source, target = (tmp_path / name for name in ("source", "target"))
    with place(request.param[0], source) as here, place(request.param[1], target) as there:
        yield here, there


@pytest.fixture
def near(tmp_path: Path) -> tuple[str, str]:
    """The DSNs of two stores that need no server."""
    return f"sqlite:///{tmp_path}/source.sqlite3", f"file://{tmp_path}/target"


@pytest.fixture
def source(near: tuple[str, str]) -> Iterator[InfoStore]:
    with opened(near[0]) as store:
        yield store


@pytest.fixture
def target(near: tuple[str, str]) -> Iterator[InfoStore]:
    with opened(near[1]) as store:
        yield store


def copy(way: tuple[str, str], *flags: str, code: int = 0) -> str:
    args = ["info", "copy", "--from", way[0], "--to", way[1], *flags]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == code, result.output
    return result.output


def everything(store: InfoStore) -> tuple[Sequence[FileInfo], dict[str, Sequence[Event]]]:
    """Return all records of a store, and the events of each upload."""
    kept = StoredUploads(store)
    infos = store.list(limit=10**6)
    return infos, {info.id: kept.read(info.id).events for info in infos}


def told(info: FileInfo, **fields: object) -> Event:
    return event(info, **{"transport": "http", **fields})  # type: ignore[arg-type]


def fill(store: InfoStore) -> None:
    """Write uploads of every kind."""
    strange = full()
    store.create(strange, [told(strange, payload={"text": "кошка", "deep": [{"a": None}]})])
    part = upload(size=5, is_partial=True)
    store.create(part)
    store.create(upload(is_final=True, partial_uploads=(part.id,) * 2, state=State.WAITING))
    gone = upload()
    store.create(gone)
    store.delete(gone, [told(gone, transport="amqp")], state=State.TERMINATED, now=7.0)
    store.create(upload(expires_at=50.0))
    for n in range(3):
        info = upload()
        store.create(info, [told(info), told(info), told(info, transport="file")])
        (first, _) = store.claim("somebody", 1.0, 10.0**10, upload=info.id)
        store.put_back(replace(first, dead=n == 0, attempts=9, error="nobody there", due_at=n))
        store.save(info, [told(info, sequence=1)])


def test_everything_arrives(way: tuple[str, str]) -> None:
    with opened(way[0]) as source, opened(way[1]) as target:
        fill(source)
        output = copy(way)
        assert "8 copied, 0 overwritten, 0 there already." in output
        assert "8 uploads with 14 undelivered post-hooks are the same" in output
        assert everything(target) == everything(source)
        assert [dead.error for dead in target.undelivered(dead=True)] == ["nobody there"]
        assert list(target.expired(60.0)) == list(source.expired(60.0)) != []
        (waiting,) = target.list({State.WAITING})
        assert list(target.finals_waiting_for(waiting.partial_uploads[0])) == [waiting.id]
        # In the source a worker has claimed events, of which nobody knows in the target.
        assert list(source.claim("another", 60.0, 61.0, transport="file")) == []
        assert len(target.claim("another", 60.0, 61.0, transport="file")) == 3


def test_the_second_run_finds_everything_there(way: tuple[str, str]) -> None:
    with opened(way[0]) as source, opened(way[1]) as target:
        fill(source)
        copy(way)
        before = everything(target)
        assert "0 copied, 0 overwritten, 8 there already." in copy(way)
        assert everything(target) == before


def test_what_differs_is_overwritten_only_when_asked(way: tuple[str, str]) -> None:
    with opened(way[0]) as source, opened(way[1]) as target:
        info = upload(size=5)
        events = [told(info, payload={"n": n}) for n in range(3)]
        source.create(info, events)
        for n in range(4):
            info = source.save(info, [told(info, sequence=n + 1)])
        old = info.replace(size=6, sequence=1)
        target.create(old, [told(old), events[1], told(old, dead=True)])
        before = everything(target)
        output = copy(way, code=1)
        assert f"{info.id}: The target has a different record of it" in output
        assert everything(target) == before
        assert "1 overwritten, 0 there already." in copy(way, "--overwrite")
        assert everything(target) == everything(source)
        saved = target.save(target.load(info.id), [last := told(info, sequence=5)])
        assert saved.size == 5
        assert target.events(info.id)[-1] == last


def test_a_record_that_was_written_more_often_is_overwritten(
    near: tuple[str, str], source: InfoStore, target: InfoStore
) -> None:
    info = upload(size=5)
    source.create(info, [told(info)])
    target.create(info.replace(size=6, sequence=7), [told(info)])
    copy(near, code=1)
    copy(near, "--overwrite")
    found = target.load(info.id)
    assert (found.size, found.sequence) == (5, 8)
    assert list(target.events(info.id)) == list(source.events(info.id))
    assert "1 there already" in copy(near)


def test_uploads_of_the_target_alone_stay(
    near: tuple[str, str], source: InfoStore, target: InfoStore
) -> None:
    source.create(upload())
    target.create(own := upload(size=3), [kept := told(own)])
    copy(near, "--overwrite")
    assert target.load(own.id) == own
    assert list(target.events(own.id)) == [kept]


Change = Callable[[InfoStore], object]


def _rewrite(store: InfoStore) -> None:
    store.save(store.list()[0].replace(offset=3))


def _settle(store: InfoStore) -> None:
    store.settle(store.undelivered(dead=False)[0])


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("change", [_rewrite, _settle, lambda store: store.create(upload())])
def test_a_server_that_still_runs_is_noticed(
    source: InfoStore, target: InfoStore, side: str, change: Change
) -> None:
    store = {"source": source, "target": target}[side]
    before = upload(id="0", size=5)
    source.create(before, [told(before)])

    @contextmanager
    def watch(ids: Sequence[str], name: str) -> Iterator[Iterable[str]]:
        yield ids
        if name == "Copying":
            change(store)

    report = Copy(partial(StoredUploads, source), target).run(watch)
    is_new_in_target = side == "target" and len(target.list()) == 2
    assert report.is_complete is is_new_in_target
    assert all("It changed while" in reason for reason in report.problems.values())


def test_an_upload_that_vanishes_is_no_end(source: InfoStore, target: InfoStore) -> None:
    infos = [upload() for _ in range(2)]
    for info in infos:
        source.create(info)

    class Vanishing(StoredUploads):
        def ids(self) -> Sequence[str]:
            return ["vanished", *super().ids()]

    report = Copy(lambda: Vanishing(source), target).run()
    assert list(target.list()) == list(source.list())
    assert list(report.problems) == ["vanished"]


def test_records_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    way = f"file://{tmp_path}/source", f"sqlite:///{tmp_path}/target.sqlite3"
    with opened(way[0]) as source, opened(way[1]) as target:
        source.create(info := upload())
        (tmp_path / "source" / "broken.info").write_text("no record")
        output = copy(way, code=1)
        assert "Skipping broken.info" in output
        assert "1 copied, 0 overwritten, 0 there already, 1 not copied." in output
        assert list(target.list()) == [info]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_it_goes_on_where_it_was_cut_off(tmp_path: Path, number: signal.Signals, kind: str) -> None:
    with place("file", tmp_path / "source") as here, place(kind, tmp_path / "target") as there:
        with opened(here) as source:
            for _ in range(COUNT):
                source.create(info := upload(), [told(info)])
            expected = everything(source)
        cut_off((here, there), number)
        with opened(there) as target:
            there_already = len(target.list(limit=COUNT))
            copied = COUNT - there_already
            output = copy((here, there))
            assert f"{copied} copied, 0 overwritten, {there_already} there already." in output
            assert everything(target) == expected


def cut_off(way: tuple[str, str], number: signal.Signals) -> None:
    """Start the command, and end it once it has begun to copy."""
    command = [sys.executable, "-m", "tuswsgi", "info", "copy", "--from", way[0], "--to", way[1]]
    with opened(way[1]) as target:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE
        while not target.list(limit=1):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.001)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in output
    if number is signal.SIGINT and process.returncode:
        assert b"Run it again to go on." in output


def test_the_configured_store_is_the_other_one(tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path), "--info-storage", "file-info-storage"]
    config = {"data_dir": tmp_path, "info_storage": "file-info-storage"}
    store = Backends(Config.load(flags=config)).info_store()
    store.prepare()
    store.create(info := upload())
    there = f"sqlite:///{tmp_path}/new.sqlite3"
    result = CliRunner().invoke(main, ["info", "copy", "--to", there, *flags])
    assert result.exit_code == 0, result.output
    assert isinstance(store, FileInfoStore)
    with opened(there) as target:
        assert list(target.list()) == [info]
        target.create(more := upload())
    result = CliRunner().invoke(main, ["info", "copy", "--from", there, *flags])
    assert result.exit_code == 0, result.output
    assert store.load(more.id) == more


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--from", "file:///a", "--to", "file:///a"], 2, "source and target are the same"),
        ([], 2, "source and target are the same"),
        (["--from", "file:///there/is/nothing"], 1, "nothing to copy at /there/is/nothing"),
        (["--from", "sqlite:////there/is/nothing"], 1, "nothing to copy at /there/is/nothing"),
        (["--from", "file://relative"], 1, "has to look like file:///directory"),
        (["--from", "gopher://host"], 1, "not supported"),
        (["--from", "postgres://127.0.0.1:1/a"], 1, "Error: "),
        (["--from", "redis://127.0.0.1:1"], 1, "Error: "),
        (["--from", "sqlite:///a", "--to", "rustus+file:///a"], 1, "not supported"),
        (
            ["--to", "file:///a", "--info-storage", "memory-info-storage"],
            1,
            "in the server's memory",
        ),
        (["--to", "file:///a", "--port", "no"], 2, "port"),
    ],
)
def test_what_cannot_work_is_said(
    args: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    result = CliRunner().invoke(main, ["info", "copy", *args])
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
