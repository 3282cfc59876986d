"""How a post-receive hook ends an upload while its bytes arrive."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

import pytest
from werkzeug.test import TestResponse

from protocol.client import Breaking, Client, assert_refused
from protocol.conftest import Serve
from tuswsgi.core.events import HookType
from tuswsgi.hooks.base import HookRequest, HookResponse

PATIENCE = 30.0
SIZE = 1_000_000


class Trickle(Breaking):
    """A body that takes its time."""

    def read(self, n: int = -1) -> bytes:
        time.sleep(0.001)
        return super().read(10)


def patch_slowly(client: Client, url: str, **headers: Any) -> TestResponse:
    environ = {"CONTENT_LENGTH": str(SIZE), "wsgi.input": Trickle(bytes(SIZE))}
    return client.patch(url, b"", 0, environ=environ, **headers)


@pytest.fixture
def stopping(serve: Serve) -> Callable[[HookResponse], Client]:
    def start(answer: HookResponse) -> Client:
        client = serve(hooks_progress_interval="20ms")

        @client.tus.on("post-receive")
        def stop(hook: HookRequest) -> HookResponse:
            return answer

        return client

    return start


def test_the_client_is_told_and_the_upload_is_gone(stopping: Any) -> None:
    answer = HookResponse(stop=True, status=410, body="enough", headers={"X-Why": "size"})
    client = stopping(answer)
    ended: queue.Queue[HookRequest] = queue.Queue()
    client.tus.on("post-terminate")(ended.put)
    url = client.create(SIZE)
    response = patch_slowly(client, url)
    assert (response.status_code, response.text) == (410, "enough")
    assert response.headers["X-Why"] == "size"
    assert_refused(client.head(url), 410)
    hook = ended.get(timeout=PATIENCE)
    assert hook.type is HookType.POST_TERMINATE
    assert 0 < hook.info.offset < SIZE


def test_a_stop_without_words(stopping: Any) -> None:
    client = stopping(HookResponse(stop=True))
    url = client.create(SIZE)
    assert_refused(patch_slowly(client, url), 400)
    assert_refused(client.head(url), 410)


def test_it_is_told_how_far_the_upload_has_come(serve: Serve) -> None:
    client = serve(hooks_progress_interval="20ms")
    offsets: list[int] = []

    @client.tus.on("post-receive")
    def stop(hook: HookRequest) -> HookResponse:
        offsets.append(hook.info.offset)
        return HookResponse(stop=len(offsets) == 3)

    patch_slowly(client, client.create(SIZE))
    assert len(offsets) >= 3
    assert offsets == sorted(offsets)
    assert 0 < offsets[0] < offsets[2] < SIZE


def test_too_late(client: Client, caplog: Any) -> None:
    heard: queue.Queue[HookRequest] = queue.Queue()

    @client.tus.on("post-receive")
    def stop(hook: HookRequest) -> HookResponse:
        heard.put(hook)
        return HookResponse(stop=True)

    url = client.create(10)
    client.append(url, b"hello", 0)
    heard.get(timeout=PATIENCE)
    client.tus.drain()
    assert "too late to stop" in caplog.text
    assert client.offset(url) == 5


def test_a_late_answer_does_not_stop_the_next_request(client: Client) -> None:
    uploads = client.tus.uploads
    heard: queue.Queue[HookRequest] = queue.Queue()
    client.tus.on("post-receive")(heard.put)
    url = client.create(10)
    client.append(url, b"hello", 0)
    late = heard.get(timeout=PATIENCE)

    class Body(Breaking):
        def read(self, n: int = -1) -> bytes:
            uploads.answered(late, HookResponse(stop=True))
            return super().read(n)

    environ = {"CONTENT_LENGTH": "5", "wsgi.input": Body(b"world")}
    assert client.patch(url, b"", 5, environ=environ).status_code == 204
    assert client.content(url) == b"helloworld"


@pytest.mark.parametrize("event", ["pre-create", "pre-finish", "post-create"])
def test_only_post_receive_stops(client: Client, event: str) -> None:
    @client.tus.on(event)
    def stop(hook: HookRequest) -> HookResponse:
        return HookResponse(stop=True)

    url = client.create(5)
    client.append(url, b"hello", 0)
    assert client.content(url) == b"hello"


class Timed(Breaking):
    """A body of which ten bytes come each 100 ms, on a clock that goes on with them.

    When an interval is over, it waits until that was told.
    """

    def __init__(self, data: bytes, interval: float) -> None:
        super().__init__(data)
        self.ahead = 0.0
        self.heard: queue.Queue[HookRequest] = queue.Queue()
        self._interval = self._next = interval

    def read(self, n: int = -1) -> bytes:
        if self.ahead > self._next + 0.05:
            self.heard.get(timeout=PATIENCE)
            self._next = self.ahead + self._interval
        self.ahead += 0.1
        return super().read(10)


@pytest.mark.parametrize("interval", [0.7, 1.0, 1.2, 1.9])
def test_progress_is_told_when_the_interval_is_over(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    client, body = serve(hooks_progress_interval=f"{interval:g}s"), Timed(bytes(600), interval)
    client.tus.on("post-receive")(body.heard.put)
    url, clock = client.create(600), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + body.ahead)
    environ = {"CONTENT_LENGTH": "600", "wsgi.input": body}
    assert client.patch(url, b"", 0, environ=environ).status_code == 204
