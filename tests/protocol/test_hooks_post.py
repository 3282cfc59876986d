"""What is told of an upload's life, to whom and in which order."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from protocol.client import Client, assert_refused
from protocol.conftest import Clock, Serve
from tuswsgi.app import Tus
from tuswsgi.core.events import HookType
from tuswsgi.core.info import State
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse
from tuswsgi.protocol.sweep import Sweeper

PATIENCE = 30.0

POST_HOOKS = tuple(type for type in HookType if not type.blocking)


class Recorder:
    """Hears all post-hooks of a server."""

    def __init__(self, tus: Tus, *types: HookType) -> None:
        self._heard: queue.Queue[HookRequest] = queue.Queue()
        for type in types or POST_HOOKS:
            tus.on(str(type))(self._heard.put)

    def next(self) -> HookRequest:
        return self._heard.get(timeout=PATIENCE)

    def types(self, count: int) -> list[str]:
        """Wait for `count` hooks and return their types."""
        return [str(self.next().type) for _ in range(count)]

    def is_silent(self) -> bool:
        return self._heard.empty()


@pytest.fixture
def recorder(client: Client) -> Recorder:
    return Recorder(client.tus)


class TestOrder:
    def test_an_upload_of_several_requests(self, client: Client) -> None:
        recorder = Recorder(client.tus)
        url = client.create(10)
        created = recorder.next()
        assert (created.type, created.info.offset) == (HookType.POST_CREATE, 0)
        client.append(url, b"hello", 0)
        received = recorder.next()
        assert (received.type, received.info.offset) == (HookType.POST_RECEIVE, 5)
        client.append(url, b"hello", 5)
        finished = recorder.next()
        assert (finished.type, finished.info.offset) == (HookType.POST_FINISH, 10)
        assert finished.info.state is State.FINISHED
        assert finished.request.method == "PATCH"
        assert client.delete(url).status_code == 204
        ended = recorder.next()
        assert (ended.type, ended.info.offset) == (HookType.POST_TERMINATE, 10)
        assert created.sequence < finished.sequence < ended.sequence
        assert len({created.id, finished.id, ended.id}) == 3
        assert recorder.is_silent()

    def test_in_one_request(self, client: Client, recorder: Recorder) -> None:
        client.create(5, b"hello")
        client.create(0)
        assert recorder.types(2) == ["post-finish"] * 2
        client.create(6, b"hello")
        created = recorder.next()
        assert created.type is HookType.POST_CREATE
        # As in rustus: its bytes are counted.
        assert created.info.offset == 5
        assert recorder.is_silent()

    def test_in_one_request_as_tusd_does(self, serve: Serve) -> None:
        client = serve(hooks_format="tusd-v2")
        recorder = Recorder(client.tus)
        client.create(5, b"hello")
        created, finished = recorder.next(), recorder.next()
        assert (created.type, created.info.offset) == (HookType.POST_CREATE, 0)
        assert (finished.type, finished.info.offset) == (HookType.POST_FINISH, 5)

    @pytest.mark.parametrize("format", ["default", "tusd-v2"])
    def test_a_final_upload_is_only_finished(self, serve: Serve, format: str) -> None:
        client = serve(hooks_format=format)
        part = client.part(b"ab")
        recorder = Recorder(client.tus)
        client.final(part, part)
        finished = recorder.next()
        assert finished.type is HookType.POST_FINISH
        assert finished.info.is_final
        assert finished.info.offset == finished.info.size == 4
        client.create(1, b"x")
        assert recorder.next().info.size == 1

    def test_a_final_upload_that_waits(self, client: Client, recorder: Recorder) -> None:
        part = client.part(b"", 1)
        assert recorder.types(1) == ["post-create"]
        client.final(part)
        client.append(part, b"x", 0)
        heard = [recorder.next() for _ in range(2)]
        assert {hook.type for hook in heard} == {HookType.POST_FINISH}
        # Uploads have an order each, and none among them.
        assert {hook.info.is_final for hook in heard} == {False, True}

    def test_removed_parts(self, serve: Serve) -> None:
        client = serve(remove_parts=True)
        parts = [client.part(b"a"), client.part(b"b")]
        recorder = Recorder(client.tus)
        client.final(*parts)
        heard = [recorder.next() for _ in range(3)]
        ended = {hook.info.id for hook in heard if hook.type is HookType.POST_TERMINATE}
        assert ended == {part.rpartition("/")[2] for part in parts}


class TestEverywhere:
    def test_an_upload_that_the_sweep_finishes(self, client: Client) -> None:
        trouble: list[Any] = [RuntimeError("broken")]

        @client.tus.on("pre-finish")
        def finish(hook: HookRequest) -> None:
            if trouble:
                raise trouble.pop()

        recorder = Recorder(client.tus, HookType.POST_FINISH)
        url = client.create(5)
        assert_refused(client.patch(url, b"hello", 0), 503)
        Sweeper(client.tus.uploads).sweep()
        assert recorder.next().info.id == url.rpartition("/")[2]

    def test_an_upload_that_expires(self, serve: Serve, clock: Clock) -> None:
        client = serve(expiration="1h")
        recorder = Recorder(client.tus, HookType.POST_TERMINATE)
        client.create(5)
        clock.ahead = 7200
        Sweeper(client.tus.uploads).sweep()
        assert recorder.types(1) == ["post-terminate"]

    def test_an_upload_that_the_application_ends(self, client: Client) -> None:
        recorder = Recorder(client.tus, HookType.POST_TERMINATE)
        client.tus.stop(client.create(5).rpartition("/")[2])
        assert recorder.types(1) == ["post-terminate"]

    def test_a_refused_upload_is_not_finished(self, client: Client, recorder: Recorder) -> None:
        @client.tus.on("pre-finish")
        def refuse(hook: HookRequest) -> HookResponse:
            return HookResponse(reject=True)

        url = client.create(5)
        assert recorder.types(1) == ["post-create"]
        assert client.patch(url, b"hello", 0).status_code == 400
        client.delete(url)
        assert recorder.types(1) == ["post-terminate"]

    def test_what_did_not_happen_is_not_told(self, serve: Serve) -> None:
        client = serve(max_file_size=10)
        recorder = Recorder(client.tus)
        client.post(11)
        client.post(5, b"hello!")
        client.delete("/files/unknown")
        client.create(1, b"x")
        assert recorder.next().info.size == 1
        assert recorder.is_silent()


class Transport(Hook):
    """A transport of the application's own."""

    name = "own"

    def __init__(self) -> None:
        self.heard: queue.Queue[HookRequest] = queue.Queue()
        self.failures = 0
        self.is_prepared = False

    def prepare(self) -> None:
        self.is_prepared = True

    def send(self, request: HookRequest) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("not now")
        self.heard.put(request)


class TestTransports:
    def test_one_of_the_applications_own(self, embed: Any, app: Any) -> None:
        own = Transport()
        tus = embed(hooks=[own], hooks_delivery_backoff="10ms")
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        url = client.create(5)
        assert own.is_prepared
        assert own.heard.get(timeout=PATIENCE).type is HookType.PRE_CREATE
        assert own.heard.get(timeout=PATIENCE).type is HookType.POST_CREATE
        own.failures = 2
        client.append(url, b"hello", 0)
        finished = own.heard.get(timeout=PATIENCE)
        assert finished.type is HookType.POST_FINISH
        # rustus' defaults leave the others out.
        client.content(url)
        assert own.heard.empty()

    def test_which_hooks_is_an_option(self, embed: Any, app: Any) -> None:
        own = Transport()
        own.types = {HookType.POST_FINISH}
        tus = embed(hooks=[own])
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        Client(app, tus).create(5, b"hello")
        assert own.heard.get(timeout=PATIENCE).type is HookType.POST_FINISH
        assert embed(hooks="post-finish").config is not None

    def test_fire_and_forget_writes_nothing(self, serve: Serve) -> None:
        client = serve(hooks_delivery="fire-and-forget")
        recorder = Recorder(client.tus)
        url = client.create(5)
        assert client.tus.uploads.infos.events(url.rpartition("/")[2]) == []
        assert recorder.types(1) == ["post-create"]
