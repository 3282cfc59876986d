"""What an embedding application hears and decides without hooks: signals, stop, methods."""

from __future__ import annotations

from typing import Any

import flask
import pytest

from tuswsgi import (
    FileInfo,
    Tus,
    upload_created,
    upload_finished,
    upload_progress,
    upload_terminated,
)

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = TUS | {"Content-Type": "application/offset+octet-stream"}


class App:
    """A Flask application with a tus server in memory."""

    def __init__(self, methods: list[str] | None = None, **options: Any) -> None:
        memory = {
            "storage": "memory-storage",
            "info_storage": "memory-info-storage",
            "locker": "memory-locker",
        }
        self.tus = Tus(**memory, **options)
        self.app = flask.Flask("embedding")
        self.app.register_blueprint(self.tus.blueprint(methods), url_prefix="/files")
        self.client = self.app.test_client()

    def post(self, size: int, body: bytes = b"", **headers: str) -> str:
        answer = self.client.post(
            "/files", data=body, headers=BYTES | {"Upload-Length": str(size), **headers}
        )
        assert answer.status_code == 201
        return answer.headers["Location"].removeprefix("http://localhost")

    def patch(self, path: str, offset: int, body: bytes) -> int:
        headers = BYTES | {"Upload-Offset": str(offset)}
        return self.client.patch(path, data=body, headers=headers).status_code


@pytest.fixture
def heard():
    """The signals that were sent, as (name, sender, offset)."""
    said: list[tuple[str, Any, int]] = []
    signals = {
        "created": upload_created,
        "progress": upload_progress,
        "finished": upload_finished,
        "terminated": upload_terminated,
    }
    receivers = []
    for name, signal in signals.items():

        def receive(sender: Any, info: FileInfo, name: str = name) -> None:
            said.append((name, sender, info.offset))

        signal.connect(receive)
        receivers.append((signal, receive))
    yield said
    for signal, receive in receivers:
        signal.disconnect(receive)


def test_the_life_of_an_upload(heard):
    app = App()
    path = app.post(5)
    assert app.patch(path, 0, b"12") == 204
    assert app.patch(path, 2, b"345") == 204
    assert app.client.head(path, headers=TUS).status_code == 200
    assert app.client.delete(path, headers=TUS).status_code == 204
    assert heard == [
        ("created", app.tus, 0),
        ("progress", app.tus, 2),
        ("finished", app.tus, 5),
        ("terminated", app.tus, 5),
    ]


def test_no_offset_is_told_twice(heard):
    app = App(hooks_progress_interval="0s")
    path = app.post(100_000)
    assert app.patch(path, 0, bytes(50_000)) == 204
    offsets = [offset for name, _, offset in heard if name == "progress"]
    assert offsets[-1] == 50_000
    assert len(offsets) == len(set(offsets)) > 1


def test_an_upload_in_one_request(heard):
    app = App()
    app.post(3, b"abc")
    assert [name for name, _, _ in heard] == ["created", "finished"]


def test_a_final_upload(heard):
    app = App()
    part = app.post(3, b"abc", **{"Upload-Concat": "partial"})
    app.client.post("/files", headers=TUS | {"Upload-Concat": f"final;{part}"})
    assert [name for name, _, _ in heard] == ["created", "finished"] * 2


def test_a_receiver_that_fails_fails_alone(heard, caplog):
    def fail(sender: Any, info: FileInfo) -> None:
        raise ZeroDivisionError

    upload_created.connect(fail)
    app = App()
    app.post(3)
    assert [name for name, _, _ in heard] == ["created"]
    assert "A receiver of tuswsgi-upload-created failed" in caplog.text
    upload_created.disconnect(fail)


def test_stop_ends_an_unfinished_upload(heard):
    app = App()
    path = app.post(5)
    assert app.tus.stop(path.rpartition("/")[2]) is True
    assert app.client.head(path, headers=TUS).status_code == 410
    assert app.tus.stop(path.rpartition("/")[2]) is False
    assert [name for name, _, _ in heard] == ["created", "terminated"]


def test_stop_leaves_a_finished_upload():
    app = App()
    path = app.post(1, b"x")
    assert app.tus.stop(path.rpartition("/")[2]) is False
    assert app.client.get(path).data == b"x"


class TestMethods:
    """The application keeps GET and DELETE for itself."""

    @pytest.fixture
    def app(self):
        app = App(["POST", "head", "PATCH", "OPTIONS"])

        @app.app.get("/files/<id>")
        def download(id: str) -> str:
            return f"the application's {id}"

        return app

    def test_get_is_the_applications(self, app):
        path = app.post(1, b"x")
        assert app.client.get(path).text == f"the application's {path.rpartition('/')[2]}"

    def test_head_stays_ours(self, app):
        answer = app.client.head(app.post(1, b"x"), headers=TUS)
        assert answer.headers["Upload-Offset"] == "1"

    def test_patch_stays_ours(self, app):
        assert app.patch(app.post(2), 0, b"ab") == 204

    def test_delete_is_nobodys(self, app):
        path = app.post(1, b"x")
        assert app.client.delete(path, headers=TUS).status_code == 405
        override = TUS | {"X-HTTP-Method-Override": "DELETE"}
        answer = app.client.post(path, headers=override)
        assert answer.status_code == 405
        assert "DELETE" not in answer.headers["Allow"]
        assert app.client.head(path, headers=TUS).status_code == 200


def test_an_owner_function_may_abort():
    def owner(request: flask.Request) -> str:
        flask.abort(401)

    app = App(owner=owner)
    answer = app.client.post("/files", headers=TUS | {"Upload-Length": "1"})
    assert answer.status_code == 401
    assert answer.headers["Tus-Resumable"] == "1.0.0"


def test_a_config_and_options_exclude_each_other():
    with pytest.raises(TypeError, match="max_file_size"):
        Tus(App().tus.config, max_file_size="1MB")
