"""The short way to uploads, past Flask.

Where an application is nothing but a tus server, Flask does nothing for a request but find
the only view, and a third of the work of a small request is Flask's. This file owns the
decision whether anybody has added something that Flask would have to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import flask
from flask import signals
from werkzeug.routing import Rule

from tuswsgi.observing.logs import current_request
from tuswsgi.web.blueprint import TusBlueprint

_WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_SIGNALS = (
    signals.request_started,
    signals.request_finished,
    signals.request_tearing_down,
    signals.got_request_exception,
    signals.appcontext_pushed,
    signals.appcontext_popped,
    signals.appcontext_tearing_down,
)

_receivers = attrgetter("receivers")


class ShortCut:
    """Passes an application's requests for uploads to the blueprint, and others to Flask.

    Its method ``answer`` takes the place of the application's ``wsgi_app``.

    :param app: an application on which nothing but `blueprint` and routes of our own are
        registered by now.
    :param prefix: where the blueprint is registered, e.g. ``/files``.
    """

    def __init__(self, app: flask.Flask, blueprint: TusBlueprint, prefix: str) -> None:
        self._app = app
        self._flask: _WSGIApp = app.wsgi_app
        self._blueprint = blueprint
        self._path = prefix.rstrip("/")
        self._below = f"{self._path}/"
        self._others = {
            rule.rule for rule in app.url_map.iter_rules() if not self._is_of_uploads(rule)
        }
        self._functions = (
            app.before_request_funcs,
            app.after_request_funcs,
            app.teardown_request_funcs,
            app.url_value_preprocessors,
        )
        # Compared later: whoever adds to one of these wants Flask to ask it.
        self._asked = self._count_asked()
        self._known_routes = {rule.rule for rule in app.url_map.iter_rules()}
        self._routes = len(app.view_functions)
        self._has_rival = False

    def answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        # Until the next one: the server has something to say of a request, too.
        current_request.set(environ)
        path: str = environ.get("PATH_INFO", "")
        if path.startswith(self._below) and path not in self._others:
            id = path[len(self._below) :]
        elif path == self._path:
            id = ""
        else:
            return self._flask(environ, start_response)
        if self._is_flasks():
            return self._flask(environ, start_response)
        return self._blueprint.answer(environ, id)(environ, start_response)

    def _is_flasks(self) -> bool:
        """Return whether Flask might do something else than call the view."""
        if len(self._app.view_functions) != self._routes:
            self._routes = len(self._app.view_functions)
            self._has_rival = any(map(self._is_rival, self._app.url_map.iter_rules()))
        return (
            self._has_rival
            or self._app.config["TRUSTED_HOSTS"] is not None
            or self._count_asked() != self._asked
            or any(map(_receivers, _SIGNALS))
        )

    def _count_asked(self) -> int:
        of_scopes = [len(some) for scopes in self._functions for some in scopes.values()]
        return sum(of_scopes) + len(self._app.teardown_appcontext_funcs)

    def _is_of_uploads(self, rule: Rule) -> bool:
        return str(rule.endpoint).startswith(f"{self._blueprint.name}.")

    def _is_rival(self, rule: Rule) -> bool:
        """Return whether a route of somebody else's may be for one of our URLs."""
        if rule.rule in self._known_routes:
            return False
        fixed, variable, _ = rule.rule.partition("<")
        below = fixed == self._path or fixed.startswith(self._below)
        return below or (bool(variable) and self._below.startswith(fixed))
