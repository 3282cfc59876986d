"""``tuswsgi hooks``: an operator lists undelivered events and retries dead letters."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tuswsgi.commands.cli import main
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, State
from tuswsgi.hooks.base import HookRequest
from tuswsgi.infostores.base import InfoStore
from tuswsgi.outbox.events import event_of

STORES = ["db-info-storage", "file-info-storage"]


@pytest.fixture(params=STORES)
def flags(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["--data-dir", str(tmp_path), "--info-storage", request.param]


@pytest.fixture
def infos(flags: list[str]) -> Iterator[InfoStore]:
    """The info store as a server holds it open."""
    store = Backends(
        Config.load(flags={"data_dir": flags[1], "info_storage": flags[3]})
    ).info_store()
    store.prepare()
    yield store
    store.close()


def hooks(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["hooks", *args])
    assert result.exit_code == code, result.output
    return result


def write(infos: InfoStore, upload: str, age: float = 0.0) -> str:
    """Create an upload with a post-create event, and return the event's id."""
    now = time.time() - age
    info = FileInfo(
        id=upload,
        size=5,
        offset=0,
        metadata=Metadata(),
        state=State.RECEIVING,
        created_at=now,
    )
    event = event_of(HookRequest(HookType.POST_CREATE, info, RequestInfo()), "http", now)
    infos.create(info, [event])
    return event.id


def fail(infos: InfoStore, upload: str, **changes: object) -> None:
    (event,) = infos.claim("worker", time.time(), time.time() + 60, upload=upload)
    infos.put_back(replace(event, **changes))  # type: ignore[arg-type]


def test_pending_and_dead_are_listed(infos: InfoStore, flags: list[str]) -> None:
    waiting = write(infos, "upload-1", age=7 * 3600)
    later = write(infos, "upload-2", age=600)
    lost = write(infos, "upload-3")
    fail(infos, "upload-2", attempts=3, error="connection refused", due_at=time.time() + 7000)
    fail(infos, "upload-3", attempts=200, error="gone", dead=True)
    head, first, second = hooks("pending", *flags).output.splitlines()
    assert " ".join(head.split()) == "ID EVENT UPLOAD TRANSPORT AGE ATTEMPTS NEXT TRY ERROR"
    assert first.split() == [waiting, "post-create", "upload-1", "http", "7h", "0", "now"]
    row = [later, "post-create", "upload-2", "http", "10m", "3", "in", "117m"]
    assert second.split() == [*row, "connection", "refused"]
    head, only = hooks("dead", *flags).output.splitlines()
    assert only.split()[:4] == [lost, "post-create", "upload-3", "http"]
    assert only.split()[5:] == ["200", "never", "gone"]


def test_control_characters_are_escaped(infos: InfoStore, flags: list[str]) -> None:
    write(infos, "a")
    (event,) = infos.undelivered(dead=False)
    infos.put_back(replace(event, error="cannot store \x1b[2J\u202e.txt"))
    _, line = hooks("pending", *flags).output.splitlines()
    assert line.endswith(r"cannot store \x1b[2J\u202e.txt")


def test_json_output(infos: InfoStore, flags: list[str]) -> None:
    lost = write(infos, "upload-1")
    fail(infos, "upload-1", attempts=200, error="gone", dead=True)
    assert json.loads(hooks("pending", "--json", *flags).output) == []
    (letter,) = json.loads(hooks("dead", "--json", *flags).output)
    assert letter.pop("created_at") == pytest.approx(time.time(), abs=300)
    assert letter == {
        "id": lost,
        "event": "post-create",
        "upload": "upload-1",
        "sequence": 0,
        "transport": "http",
        "attempts": 200,
        "due_at": None,
        "error": "gone",
    }


@pytest.mark.parametrize("by", ["event", "upload", "all"])
def test_dead_letters_are_tried_again(infos: InfoStore, flags: list[str], by: str) -> None:
    ids = [write(infos, f"upload-{number}") for number in range(3)]
    for number in range(3):
        fail(infos, f"upload-{number}", attempts=200, due_at=time.time() + 600, dead=True)
    args = {"event": [ids[1]], "upload": ["upload-1"], "all": []}[by]
    count = 3 if by == "all" else 1
    assert hooks("replay", *args, *flags).output == f"{count} will be delivered again.\n"
    assert len(infos.undelivered(dead=True)) == 3 - count
    again = infos.claim("worker", time.time(), time.time() + 60)
    assert len(again) == count
    assert ids[1] in {event.id for event in again}
    assert {event.attempts for event in again} == {0}


def test_replay_of_an_event_that_is_not_dead(infos: InfoStore, flags: list[str]) -> None:
    waiting = write(infos, "upload-1")
    result = hooks("replay", waiting, *flags, code=1)
    assert f"There is no dead letter with the ID {waiting}." in result.output
    assert hooks("replay", *flags).output == "0 will be delivered again.\n"


def test_a_store_in_memory_is_refused() -> None:
    result = hooks("pending", "--info-storage", "memory-info-storage", code=1)
    assert "in the server's memory" in result.output


def test_a_wrong_configuration_is_reported() -> None:
    assert "[hooks] delivery = soon" in hooks("dead", "--hooks-delivery", "soon", code=2).output
