"""A record that was written although nobody could say so: its bytes are still there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import databases
import pytest
import redis_service
from line import Line

from protocol.client import Client, assert_refused, path_of
from protocol.conftest import Serve
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse

pytestmark = pytest.mark.parametrize("backends", ["file"], indirect=True)

#: What only the request that writes a new record says.
CREATE = {"redis": b'"state":"', "postgres": b"COMMIT", "mysql": b"\3COMMIT"}


@pytest.fixture(params=CREATE)
def store(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def cut_line(store: str) -> Iterator[tuple[Line, dict[str, Any]]]:
    """A line to an info store, and the options of a server that uses it."""
    with ExitStack() as stack:
        if store == "redis":
            settings = stack.enter_context(redis_service.own_keys())
            line = Line(redis_service.url())
            options = {"info_storage": "redis-info-storage", "redis_prefix": settings.redis_prefix}
        else:
            line = Line(stack.enter_context(databases.SERVERS[store]()))
            options = {"info_storage": "db-info-storage"}
        stack.callback(line.close)
        yield line, {**options, "info_db_dsn": line.url}


@pytest.fixture
def line(cut_line: tuple[Line, dict[str, Any]]) -> Line:
    return cut_line[0]


@pytest.fixture
def client(cut_line: tuple[Line, dict[str, Any]], serve: Serve) -> Client:
    client = serve(**cut_line[1])
    client.create(1, b"x")  # everything is connected by now
    return client


def post(client: Client, line: Line, store: str, size: int, body: bytes = b"") -> None:
    """Send a POST whose record is written, while the answer to that gets lost."""
    line.cut_after(CREATE[store])
    assert_refused(client.post(size, body), 503)
    line.restore()


def test_bytes_stay_with_their_record(client: Client, line: Line, store: str) -> None:
    before = {info.id for info in client.tus.uploads.infos.list()}
    post(client, line, store, 5, b"hello")
    post(client, line, store, 11, b"hello")
    finished, unfinished = (
        info for info in client.tus.uploads.infos.list() if info.id not in before
    )
    assert client.content(f"/files/{finished.id}") == b"hello"
    client.append(f"/files/{unfinished.id}", b" world", 5)
    assert client.content(f"/files/{unfinished.id}") == b"hello world"


@pytest.mark.parametrize(
    "change",
    [{"id": "chosen"}, {"path": "a/b.txt"}, {"id": "chosen", "path": "a/b.txt"}],
    ids=["id", "path", "both"],
)
def test_a_post_that_comes_again_goes_on(
    client: Client, line: Line, store: str, change: dict[str, str]
) -> None:
    @client.tus.on("pre-create")
    def choose(request: HookRequest) -> HookResponse:
        return HookResponse(change=ChangeFileInfo(**change))

    post(client, line, store, 11, b"hello")
    again = client.post(11, b"hello")
    assert (again.status_code, again.headers["Upload-Offset"]) == (201, "0")
    client.append(path_of(again), b"hello world", 0)
    assert client.content(path_of(again)) == b"hello world"


@pytest.mark.parametrize("store", ["postgres", "mysql"], indirect=True)
def test_no_room_stays_promised_to_an_upload_that_nobody_knows(
    cut_line: tuple[Line, dict[str, Any]], serve: Serve, store: str
) -> None:
    line, options = cut_line
    client = serve(**options, limited_max_total_size=100)
    client.create(1)
    line.cut_after(CREATE[store], restarts=True)
    assert_refused(client.post(99, b"x" * 99), 503)
    assert client.tus.uploads.infos.usage() == 1
    client.create(99)
