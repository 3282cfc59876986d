"""Metrics of one process, as an embedding application without our settings has them."""

from __future__ import annotations

import sys
import time
from typing import Any

import flask
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tuswsgi import Tus
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError, Unavailable
from tuswsgi.infostores.base import Census
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.observing.telemetry import bytes_reclaimed, report
from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings
from tuswsgi.serving.settings import gunicorn_settings

TUS = {"Tus-Resumable": "1.0.0"}
MEMORY = {"storage": "memory-storage", "locker": "memory-locker"}


class InfoStore(MemoryInfoStore):
    """A store that cannot be counted while it is away."""

    is_away = False

    def census(self, stalled_before: float) -> Census:
        if self.is_away:
            raise Unavailable
        return super().census(stalled_before)


class App:
    """A Flask application with a tus server in memory, and what its counters have counted."""

    def __init__(self, **options: Any) -> None:
        self.infos = InfoStore()
        self.tus = Tus(metrics=True, info_store=self.infos, **MEMORY, **options)
        self.app = flask.Flask("embedding")
        self.app.register_blueprint(self.tus.blueprint(), url_prefix="/files")
        self.app.register_blueprint(self.tus.monitoring_blueprint(), url_prefix="/tus")
        self.client = self.app.test_client()
        self._before = self.values()

    def values(self) -> dict[str, float]:
        text = self.client.get("/tus/metrics").text
        return {
            sample.name.removeprefix("tuswsgi_"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def counted(self, name: str) -> float:
        return self.values()[name] - self._before.get(name, 0)

    def create(self) -> str:
        answer = self.client.post("/files", headers=TUS | {"Upload-Length": "5"})
        return answer.headers["Location"].rpartition("/")[2]


def test_an_upload_that_expires():
    app = App(expiration="200ms")
    id = app.create()
    body = TUS | {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    app.client.patch(f"/files/{id}", data=b"123", headers=body)
    kept = app.counted("received_bytes_total")
    deadline = time.monotonic() + 60
    while app.client.head(f"/files/{id}", headers=TUS).status_code != 410:
        assert time.monotonic() < deadline
    for search in CleanUp(app.tus.uploads, CleanUpSettings()).searches():
        list(search.removals())
    assert app.counted("uploads_expired_total") == 1
    assert app.counted("uploads_terminated_total") == 0
    assert app.counted("reclaimed_bytes_total") == kept


def test_two_servers_of_a_process_count_together():
    first, second = App(), App()
    first.create()
    second.create()
    assert first.counted("uploads_created_total") == second.counted("uploads_created_total") == 2


def test_what_the_application_refuses_is_an_error():
    app = App(owner=lambda request: flask.abort(401))
    assert app.client.post("/files", headers=TUS | {"Upload-Length": "5"}).status_code == 401
    labels = 'code="ERR_ABORTED",status="401"'
    assert f"tuswsgi_errors_total{{{labels}}} 1.0" in app.client.get("/tus/metrics").text


def test_a_receiver_that_fails_fails_alone(caplog):
    def fail(sender: object, **values: Any) -> None:
        raise ZeroDivisionError

    with bytes_reclaimed.connected_to(fail):
        report(bytes_reclaimed, None, size=1)
    assert "A receiver of tuswsgi-bytes-reclaimed failed" in caplog.text


def test_a_store_that_is_away_takes_only_its_own_metrics_away():
    app = App()
    assert "uploads_in_progress" in app.values()
    app.infos.is_away = True
    deadline = time.monotonic() + 60
    while "uploads_in_progress" in app.values():  # for a moment what was seen is good
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "uploads_created_total" in app.values()


def test_a_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for make in (Tus, lambda **flags: gunicorn_settings(Config.load(flags=flags))):
        with pytest.raises(ConfigurationError, match=r"pip install 'tuswsgi-server\[metrics\]'"):
            make(metrics=True)
