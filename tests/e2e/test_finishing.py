"""The last byte makes the data complete, not the upload: hooks that fail, refuse, and die."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.client import BYTES, TUS, Client, content, path_of, wait_until
from e2e.conftest import OTHERS_READY, Server, running

HERE = Path(__file__).parent
DATA = content(100_000)


@pytest.fixture
def hooked(tmp_path: Path) -> Iterator[Server]:
    command = [
        *(sys.executable, "-m", "gunicorn", "-k", "tuswsgi.serving.worker.TusWorker", "-w", "2"),
        *("-b", "127.0.0.1:0", "--no-control-socket", "--chdir", str(HERE), "hooked_app:app"),
    ]
    environ = {"DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(HERE.parent.parent)}
    behave(tmp_path, "nothing")
    with running(Server(command, tmp_path / "data", environ, ready=OTHERS_READY)) as server:
        yield server


def behave(tmp_path: Path, behaviour: str) -> None:
    (tmp_path / "behaviour").write_text(behaviour)


def calls(tmp_path: Path, path: str) -> int:
    text = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    return text.count(path.rpartition("/")[2])


def unfinished(client: Client) -> str:
    path = client.create(len(DATA))
    assert client.patch(path, 0, DATA[:60_000]).offset == 60_000
    return path


def test_nobody_hears_the_full_offset_before_the_hook_worked(
    hooked: Server, tmp_path: Path
) -> None:
    client, hooked.expected = hooked.client, "RuntimeError: the hook is broken"
    path = unfinished(client)
    behave(tmp_path, "fail")
    for answer in (
        client.patch(path, 60_000, DATA[60_000:]),
        client.head(path),
        client.patch(path, len(DATA), b""),
    ):
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert "upload-offset" not in answer.headers
        assert b"broken" not in answer.body
    assert client.get(path).status == 404
    hooked.restart()
    client = hooked.client
    assert client.head(path).status == 503
    behave(tmp_path, "answer")
    assert client.offset(path) == len(DATA)
    assert client.get(path).body == DATA
    asked = calls(tmp_path, path)
    assert client.offset(path) == len(DATA)
    assert calls(tmp_path, path) == asked, "a hook that worked is not asked again"


def test_the_final_answer_is_repeated(hooked: Server, tmp_path: Path) -> None:
    client = hooked.client
    path = unfinished(client)
    behave(tmp_path, "answer")
    first = client.patch(path, 60_000, DATA[60_000:])
    behave(tmp_path, "fail")
    hooked.restart()
    again = hooked.client.patch(path, len(DATA), b"")
    for answer in (first, again):
        assert (answer.status, answer.body) == (200, b"Thank you.")
        assert answer.headers["x-ticket"] == "7"
        assert answer.offset == len(DATA)
    assert hooked.client.offset(path) == len(DATA)
    assert calls(tmp_path, path) == 1


def test_a_refusal_is_final(hooked: Server, tmp_path: Path) -> None:
    client = hooked.client
    path = unfinished(client)
    behave(tmp_path, "refuse")
    first = client.patch(path, 60_000, DATA[60_000:])
    assert first.body == b"No cats, please."
    behave(tmp_path, "answer")
    hooked.restart()
    client = hooked.client
    answers = [first, client.head(path), client.patch(path, len(DATA), b""), client.get(path)]
    for answer in answers:
        assert answer.status == 422
        assert answer.headers["x-reason"] == "cats"
    assert answers[2].body == answers[3].body == b"No cats, please."
    assert client.patch(path, 60_000, DATA[60_000:]).status in (409, 422)
    assert calls(tmp_path, path) == 1
    assert client.request("DELETE", path, TUS).status == 204
    assert client.head(path).status == 410


def test_creation_with_upload_is_asked_too(hooked: Server, tmp_path: Path) -> None:
    client, headers = hooked.client, {**BYTES, "Upload-Length": len(DATA)}
    behave(tmp_path, "answer")
    created = client.request("POST", "/files/", headers, DATA)
    assert created.headers["x-ticket"] == "7"
    assert client.get(path_of(created)).body == DATA
    behave(tmp_path, "refuse")
    assert client.request("POST", "/files/", headers, DATA).status == 422


def test_a_worker_that_dies_in_the_hook(hooked: Server, tmp_path: Path) -> None:
    client = hooked.client
    path = unfinished(client)
    behave(tmp_path, "die")
    with client.start_patch(path, 60_000, 40_000) as connection:
        connection.send(DATA[60_000:])
        assert connection.is_closed()
    assert hooked.stored(path) == len(DATA)
    behave(tmp_path, "answer")
    assert client.offset(path) == len(DATA)
    assert client.patch(path, len(DATA), b"").body == b"Thank you."
    assert client.get(path).body == DATA


def test_a_start_finishes_what_a_crash_left(hooked: Server, tmp_path: Path) -> None:
    """Nobody comes back for it: the sweep of the next start does it."""
    client = hooked.client
    paths = [unfinished(client) for _ in range(3)]
    behave(tmp_path, "die")
    for path in paths:
        with client.start_patch(path, 60_000, 40_000) as connection:
            connection.send(DATA[60_000:])
            assert connection.is_closed()
        assert hooked.stored(path) == len(DATA)
    hooked.kill()
    behave(tmp_path, "answer")
    hooked.start()
    for path in paths:
        wait_until(lambda path=path: hooked.client.get(path).status == 200, "the sweep")
        assert hooked.client.get(path).body == DATA


def test_a_final_upload_is_asked_too(hooked: Server, tmp_path: Path) -> None:
    client = hooked.client
    hooked.expected = "RuntimeError: the hook is broken"
    parts = [client.create(100, Upload_Concat="partial") for _ in range(2)]
    for part in parts:
        client.finish(part, content(100))
    behave(tmp_path, "fail")
    concat = "final;" + " ".join(parts)
    refused = client.request("POST", "/files/", {**TUS, "Upload-Concat": concat})
    assert refused.status == 503
    behave(tmp_path, "nothing")
    path = client.create_final(parts)
    assert client.offset(path) == 200
    assert client.get(path).body == content(100) * 2
