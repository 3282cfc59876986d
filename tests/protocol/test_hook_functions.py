"""Hook functions of a Flask application: refusals by ``abort``, and the application's context."""

from __future__ import annotations

import logging
from queue import SimpleQueue

import flask
import pytest

from protocol.client import Client
from tuswsgi import HookRequest, HookResponse

PATIENCE = 30.0


class TestRefusals:
    def test_abort_is_the_response(self, client: Client) -> None:
        @client.tus.on("pre-create")
        def refuse(hook: HookRequest) -> None:
            flask.abort(409, "This name is taken.")

        response = client.post(5)
        assert response.status_code == 409
        assert "This name is taken." in response.text
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert "Retry-After" not in response.headers

    def test_the_application_handles_its_errors(self, client: Client) -> None:
        @client.app.errorhandler(403)
        def as_json(error: Exception) -> tuple[dict[str, str], int]:
            return {"reason": "unpaid"}, 403

        @client.tus.on("pre-create")
        def refuse(hook: HookRequest) -> None:
            flask.abort(403)

        response = client.post(5)
        assert (response.status_code, response.json) == (403, {"reason": "unpaid"})

    def test_abort_by_pre_finish_is_final(self, client: Client) -> None:
        @client.tus.on("pre-finish")
        def refuse(hook: HookRequest) -> None:
            flask.abort(422, "This is no image.")

        path = client.create(5)
        assert client.patch(path, b"hello", 0).status_code == 422
        response = client.head(path)
        assert response.status_code == 422

    @pytest.mark.parametrize("value", [False, True, 0, "no", (409, "no")])
    def test_other_return_values_refuse(
        self, client: Client, value: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        @client.tus.on("pre-create")
        def returns_nonsense(hook: HookRequest) -> HookResponse | None:
            return value  # type: ignore[return-value]

        with caplog.at_level(logging.ERROR, "tuswsgi"):
            response = client.post(5)
        assert response.status_code == 500
        assert f"returns_nonsense returned {value!r}" in caplog.text
        assert "HookResponse or None" in caplog.text


class TestContext:
    def test_a_post_hook_runs_in_the_context_of_its_application(self, client: Client) -> None:
        names: SimpleQueue[str] = SimpleQueue()
        closed: SimpleQueue[bool] = SimpleQueue()

        @client.app.teardown_appcontext
        def close_session(error: BaseException | None) -> None:
            if not flask.has_request_context():
                closed.put(True)

        @client.tus.on("post-finish")
        def use_application(hook: HookRequest) -> None:
            names.put(flask.current_app.name)

        client.patch(client.create(5), b"hello", 0)
        assert names.get(timeout=PATIENCE) == client.app.name
        assert closed.get(timeout=PATIENCE)
