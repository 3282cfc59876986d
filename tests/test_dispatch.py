"""The dispatcher in front of Flask: uploads past it, everything else by it."""

from __future__ import annotations

from pathlib import Path

import flask
import pytest
from werkzeug.test import Client

from tuswsgi.app import create_app
from tuswsgi.config.loading import Config
from tuswsgi.serving.dispatch import Dispatcher, application

TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture(params=["/files", "/", "/a/b/"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    flags = {"data_dir": str(tmp_path), "info_storage": "memory-info-storage"}
    return Config.load(flags=flags | {"locker": "memory-locker", "url": request.param})


@pytest.fixture
def asked() -> list[str]:
    """The paths for which Flask was asked."""
    return []


@pytest.fixture
def client(config: Config, asked: list[str]) -> Client:
    app = create_app(config)
    app.before_request(lambda: asked.append(flask.request.path))
    return Client(Dispatcher(app))


def url_of(path: str, config: Config) -> str:
    base: str = create_app(config).url_map.bind("").build("tus.upload")
    return base.rstrip("/") + path


def test_uploads_do_not_go_through_flask(client: Client, asked: list[str], config: Config) -> None:
    for path in (url_of("", config) or "/", url_of("/", config)):
        answer = client.post(path, headers=TUS | {"Upload-Length": "5"})
        assert answer.status_code == 201
        location = answer.headers["Location"].removeprefix("http://localhost")
        assert client.head(location, headers=TUS).status_code == 200
        assert client.head(f"{location}/", headers=TUS).status_code == 200
        assert client.delete(location, headers=TUS).status_code == 204
    assert client.head(url_of("/no/such", config), headers=TUS).status_code == 404
    assert asked == []


def test_other_pages_do(client: Client, asked: list[str], config: Config) -> None:
    assert client.get("/health").text == "ok"
    assert client.get("/ready").status_code == 200
    assert asked == ["/health", "/ready"]
    if url_of("", config):
        assert client.get(url_of("s", config)).status_code == 404
        assert client.get("/other").status_code == 404
        assert len(asked) == 4


def test_the_server_is_found_by_the_worker(config: Config) -> None:
    assert application(config).extensions["tuswsgi"].config is config
