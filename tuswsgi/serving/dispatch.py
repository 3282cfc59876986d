"""The WSGI application of ``tuswsgi serve`` and ``wsgi.py``: Flask, with a short way to uploads.

For a request for an upload Flask would find the only view and call it, which is a third of the
work of a small request. This application calls it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flask

from tuswsgi.app import create_app
from tuswsgi.config.loading import Config
from tuswsgi.config.server import ServerSettings
from tuswsgi.observing.logs import current_request
from tuswsgi.web.blueprint import TusBlueprint


class Dispatcher:
    """Serves the URLs of uploads itself and leaves all others to a Flask application.

    Nothing that is registered with the application is asked about uploads: no function,
    no signal and no rule. An application that has such things is to be served as it is.

    :param app: an application that ``create_app`` has returned.
    :ivar extensions: those of the application.
    """

    def __init__(self, app: flask.Flask) -> None:
        self.extensions = app.extensions
        tus = self.extensions["tuswsgi"]
        blueprint = app.blueprints[tus.name]
        assert isinstance(blueprint, TusBlueprint)
        self._flask = app.wsgi_app
        self._answer = blueprint.answer
        path = tus.config.build(ServerSettings).url.strip("/")
        self._path = f"/{path}" if path else ""
        self._below = f"{self._path}/"
        # Where uploads are at /, the pages beside them win.
        self._pages = {
            rule.rule
            for rule in app.url_map.iter_rules()
            if not rule.endpoint.startswith(f"{tus.name}.")
        }

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        # It stays until the next request: the access log is written after this one.
        current_request.set(environ)
        path: str = environ.get("PATH_INFO", "")
        if path.startswith(self._below) and path not in self._pages:
            id = path[len(self._below) :]
        elif path == self._path:
            id = ""
        else:
            return self._flask(environ, start_response)
        return self._answer(environ, id)(environ, start_response)


def application(config: Config) -> Dispatcher:
    """Return the server's WSGI application.

    :raises ConfigurationError: if the configuration is wrong.
    """
    return Dispatcher(create_app(config))
