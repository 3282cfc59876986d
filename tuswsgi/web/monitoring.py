"""The pages for monitoring: ``/health``, ``/ready`` and ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable

import flask

from tuswsgi.protocol.readiness import Readiness
from tuswsgi.web.settings import HEALTH, METRICS, READY

#: Returns the metrics and their content type, for a request's ``Accept`` header.
Exposition = Callable[[str], tuple[bytes, str]]


class MonitoringBlueprint(flask.Blueprint):
    """The pages for monitoring.

    :param exposition: ``None`` to serve no metrics.
    """

    def __init__(self, name: str, readiness: Readiness, exposition: Exposition | None) -> None:
        super().__init__(name, __name__)
        self._readiness = readiness
        self._exposition = exposition
        self.add_url_rule(HEALTH, "health", self._health)
        self.add_url_rule(READY, "ready", self._ready)
        if exposition is not None:
            self.add_url_rule(METRICS, "metrics", self._metrics)
        self.after_request(_forbid_caching)

    def _health(self) -> flask.Response:
        return flask.Response("ok", content_type="text/plain; charset=utf-8")

    def _ready(self) -> flask.Response:
        problems = self._readiness.problems()
        is_ready = not any(problems.values())
        answer = flask.jsonify(
            ready=is_ready, checks={name: problem or "ok" for name, problem in problems.items()}
        )
        answer.status_code = 200 if is_ready else 503
        return answer

    def _metrics(self) -> flask.Response:
        assert self._exposition is not None
        text, content_type = self._exposition(flask.request.headers.get("Accept", ""))
        return flask.Response(text, content_type=content_type)


def _forbid_caching(response: flask.Response) -> flask.Response:
    response.headers["Cache-Control"] = "no-store"
    return response
