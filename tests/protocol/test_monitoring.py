"""``/health`` and ``/ready``: what they tell, and how little they do for it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest

from tuswsgi import Tus
from tuswsgi.app import create_app
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.datastores.memory import MemoryDataStore
from tuswsgi.hooks.base import Hook, HookRequest

TUS = {"Tus-Resumable": "1.0.0"}
MEMORY = {"info_storage": "memory-info-storage", "locker": "memory-locker"}


def client_of(data_dir: Path, **options: Any) -> Any:
    return create_app(Config.load(flags={"data_dir": data_dir, **options})).test_client()


def embedded(**options: Any) -> Any:
    app = flask.Flask("embedding")
    app.register_blueprint(Tus(**MEMORY, **options).monitoring_blueprint(), url_prefix="/tus")
    return app.test_client()


class Store(MemoryDataStore):
    """A data store whose checks tests watch."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.error: Exception | None = None

    def check(self) -> None:
        self.checks += 1
        self.goes_on.wait()
        if self.error is not None:
            raise self.error


class Broker(Hook):
    """A transport that cannot be reached."""

    name = "broker"

    def send(self, request: HookRequest) -> None:
        raise ConnectionRefusedError

    def check(self) -> None:
        raise ConnectionRefusedError


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.goes_on.set()


def test_a_server_that_is_well(tmp_path):
    client = client_of(tmp_path)
    answer = client.get("/health")
    assert (answer.status_code, answer.data) == (200, b"ok")
    answer = client.get("/ready")
    assert answer.status_code == 200
    checks = {"info_store": "ok", "data_store": "ok", "free_disk": "ok", "locker": "ok"}
    assert answer.json == {"ready": True, "checks": checks}
    assert answer.headers["Cache-Control"] == "no-store"
    assert client.head("/ready").status_code == 200


@pytest.mark.parametrize("info_storage", ["db-info-storage", "file-info-storage"])
def test_a_data_directory_that_went_away(tmp_path, info_storage):
    client = client_of(tmp_path / "data", info_storage=info_storage)
    assert client.options("/files").status_code == 204  # it has begun to work
    shutil.rmtree(tmp_path / "data")
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert not answer.json["ready"]
    assert answer.json["checks"]["data_store"] == "It cannot be used; the log says why."
    assert client.get("/health").status_code == 200


def test_a_configuration_that_cannot_work(tmp_path):
    (tmp_path / "file").write_text("")
    answer = client_of(tmp_path / "file" / "data").get("/ready")
    assert answer.status_code == 503
    assert str(tmp_path) not in answer.text


def test_a_disk_that_is_almost_full(tmp_path):
    answer = client_of(tmp_path, min_free_disk="1000000PB").get("/ready")
    assert answer.status_code == 503
    checks = answer.json["checks"]
    assert "are wanted (min_free_disk)" in checks.pop("free_disk")
    assert set(checks.values()) == {"ok"}


def test_a_server_that_stops():
    tus = Tus(storage="memory-storage", **MEMORY)
    app = flask.Flask("embedding")
    app.register_blueprint(tus.monitoring_blueprint())
    tus.stop_uploads()
    assert app.test_client().get("/ready").json["checks"]["server"] == "It is about to stop."


def test_errors_are_for_the_log(store, caplog):
    client = embedded(data_store=store)
    store.error = OSError("password=secret")
    assert client.get("/tus/ready").status_code == 503
    assert "secret" not in client.get("/tus/ready").text
    assert caplog.text.count("Not ready: data_store: OSError: password=secret") == 1
    store.error = None
    deadline = time.monotonic() + 60
    while client.get("/tus/ready").status_code != 200:
        assert time.monotonic() < deadline


def test_a_store_that_hangs_is_asked_once(store):
    client = embedded(data_store=store)
    store.goes_on.clear()
    for _ in range(3):
        answer = client.get("/tus/ready")
        assert answer.status_code == 503
        assert answer.json["checks"]["data_store"] == "No answer within a second."
    assert store.checks == 1
    assert client.get("/tus/health").status_code == 200


def test_many_who_ask_are_told_the_same(store):
    client, began = embedded(data_store=store), time.monotonic()
    for _ in range(30):
        assert client.get("/tus/ready").status_code == 200
    assert store.checks <= 1 + (time.monotonic() - began)


@pytest.mark.parametrize("needed", [True, False])
def test_the_broker_of_hooks(store, needed):
    answer = embedded(data_store=store, hooks=[Broker()], ready_needs_hooks=needed).get(
        "/tus/ready"
    )
    assert answer.status_code == (503 if needed else 200)
    assert ("hooks_broker" in answer.json["checks"]) is needed


class TestUploadsAtTheRoot:
    """`url = /`: the paths of the server itself win, where they have something to say."""

    @pytest.fixture
    def client(self, tmp_path):
        return client_of(tmp_path, url="/")

    def test_monitoring_wins(self, client):
        assert client.get("/health").data == b"ok"
        assert client.get("/ready").json["ready"] is True

    def test_other_methods_are_those_of_uploads(self, client):
        answer = client.delete("/health", headers=TUS)
        assert (answer.status_code, answer.headers["Tus-Resumable"]) == (404, "1.0.0")

    def test_uploads_work(self, client):
        answer = client.post("/", headers=TUS | {"Upload-Length": "0"})
        path = answer.headers["Location"].removeprefix("http://localhost")
        assert client.head(path, headers=TUS).status_code == 200
        assert client.get("/healthy").headers["Tus-Resumable"] == "1.0.0"


@pytest.mark.parametrize("url", ["/health", "ready/", "/metrics"])
def test_uploads_cannot_be_there(url):
    with pytest.raises(ConfigurationError, match="taken by the server itself"):
        create_app(Config.load(flags={"url": url}))
