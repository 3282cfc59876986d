"""Servers for the tests of the protocol, on every combination of backends that matters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flask
import pytest

from protocol.client import Client, closing
from tuswsgi.app import Tus, create_app
from tuswsgi.config.loading import Config

BACKENDS = {
    "memory": {
        "storage": "memory-storage",
        "info_storage": "memory-info-storage",
        "locker": "memory-locker",
    },
    "file": {
        "storage": "file-storage",
        "info_storage": "db-info-storage",
        "locker": "file-locker",
    },
}

#: For tests of what is decided before any backend is asked.
on_memory = pytest.mark.parametrize("backends", ["memory"], indirect=True)

Serve = Callable[..., Client]


class Clock:
    """The time of day, which tests can turn forward."""

    def __init__(self) -> None:
        self._time = time.time
        self.ahead = 0.0

    def __call__(self) -> float:
        return self._time() + self.ahead


@pytest.fixture(autouse=True)
def _no_sweep_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests sweep when they want to; a server's own sweep would come in between."""
    monkeypatch.setattr(Tus, "_sweep", lambda self: None)


@pytest.fixture(params=BACKENDS)
def backends(request: pytest.FixtureRequest) -> dict[str, str]:
    """The options that choose the backends."""
    chosen: dict[str, str] = BACKENDS[request.param]
    return chosen


@pytest.fixture
def options(backends: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """The options of a server with these backends, in a directory of its own."""
    return {**backends, "data_dir": str(tmp_path / "data"), "lock_timeout": "5s"}


@pytest.fixture
def serve(options: dict[str, Any]) -> Iterator[Serve]:
    """Start a server with more options, and return a client of it."""
    with ExitStack() as stack:

        def start(**more: Any) -> Client:
            app = create_app(Config.load(flags=options | more))
            tus = stack.enter_context(closing(app.extensions["tuswsgi"]))
            return Client(app, tus)

        yield start


@pytest.fixture
def embed(options: dict[str, Any]) -> Iterator[Callable[..., Tus]]:
    """Make a server for an application of the test's own."""
    with ExitStack() as stack:

        def make(**more: Any) -> Tus:
            return stack.enter_context(closing(Tus(**(options | more))))

        yield make


@pytest.fixture
def client(serve: Serve) -> Client:
    """A client of a server as it is by default."""
    return serve()


@pytest.fixture
def app() -> flask.Flask:
    """An application to embed a server in."""
    return flask.Flask("embedding", static_folder=None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server's time of day."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock
