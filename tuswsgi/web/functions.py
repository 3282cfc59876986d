"""Calls the hook functions of a Flask application as its developer expects.

A function for a post-hook runs outside of any request, so it gets the application's context, and
``abort()`` in a function for a blocking hook refuses the request with that very response.
"""

from __future__ import annotations

import flask
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from tuswsgi.core.errors import HookRefusal
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.callable import HookFunction


class Caller:
    """Calls functions for an application, as soon as that is known."""

    def __init__(self) -> None:
        #: The application in which the blueprint is registered.
        self.app: flask.Flask | None = None

    def __call__(self, function: HookFunction, request: HookRequest) -> object:
        """Call a function for a hook.

        :raises HookRefusal: if the function of a blocking hook raises an ``HTTPException``.
        """
        if request.type.blocking:
            try:
                return function(request)
            except HTTPException as error:
                raise _refusal(error) from error
        if self.app is None or flask.has_app_context():
            return function(request)
        with self.app.app_context():
            return function(request)


def _refusal(error: HTTPException) -> HookRefusal:
    response: Response
    if flask.has_request_context():
        app = flask.current_app
        # The application may have an error handler for it.
        response = app.make_response(app.handle_user_exception(error))
    else:
        response = Response.force_type(error.get_response())
    headers = {name: value for name, value in response.headers if name != "Content-Length"}
    return HookRefusal(response.status_code, response.get_data(as_text=True), headers)
