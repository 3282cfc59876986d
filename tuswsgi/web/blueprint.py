"""The Flask blueprint: URL rules, the choice of the method, and errors as answers.

One rule takes every method, so that each answer below the URL, 404 and 405 included, is
ours and carries the headers that tus and browsers need.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import flask
from flask.sansio.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter, Rule

from tuswsgi.errors import (
    BodyIncomplete,
    MethodNotAllowed,
    ReadTimeout,
    StorageFull,
    TusError,
    Unavailable,
)
from tuswsgi.hooks.base import RequestInfo
from tuswsgi.protocol.headers import METHOD_OVERRIDE, TUS_RESUMABLE, VERSION, TusHeaders
from tuswsgi.protocol.uploads import Uploads
from tuswsgi.web.body import body_of
from tuswsgi.web.cors import Cors
from tuswsgi.web.request_body import RequestBody
from tuswsgi.web.responses import Answer, Headers, TusResponse, error_response
from tuswsgi.web.settings import WebSettings
from tuswsgi.web.urls import origin_of, request_uri
from tuswsgi.web.views import Call, Views

log = logging.getLogger(__name__)

#: Returns who sends a request, ``None`` for nobody in particular.
OwnerFunction = Callable[[flask.Request], "str | None"]


class _Rest(BaseConverter):
    """Everything that follows, slashes and nothing at all included."""

    regex = r"[\s\S]*?"
    part_isolating = False
    # Before an application's own rule for a download, to which Flask adds HEAD.
    weight = 50


class TusBlueprint(flask.Blueprint):
    """The routes of one tus server.

    ``before_request`` functions of the embedding application run before any byte of a
    body is read, and what they answer gets the headers of every other answer.

    :param before_first: called before each request is looked at.
    :param methods: the methods to take, ``None`` for all.
    """

    def __init__(
        self,
        name: str,
        uploads: Uploads,
        settings: WebSettings,
        *,
        owner: OwnerFunction | None = None,
        before_first: Callable[[], None] = lambda: None,
        methods: Collection[str] | None = None,
    ) -> None:
        super().__init__(name, __name__)
        self._uploads = uploads
        self._settings = settings
        self._owner = owner
        self._before_first = before_first
        self._methods = None if methods is None else {method.upper() for method in methods}
        self._views = Views(uploads, settings, self._methods)
        self._cors = Cors(settings)
        self.record(self._add_rules)
        self.after_request(self._complete)

    def _add_rules(self, state: BlueprintSetupState) -> None:
        # Werkzeug's own rules: Flask's would redirect /files, merge slashes and answer
        # unknown methods themselves.
        app = state.app
        app.url_map.converters.setdefault("tus_rest", _Rest)
        endpoint = f"{state.name_prefix}.{state.name}.upload".lstrip(".")
        prefix = (state.url_prefix or "").rstrip("/")
        for path in (prefix or "/", f"{prefix}/<tus_rest:tus_id>"):
            app.url_map.add(
                Rule(
                    path,
                    endpoint=endpoint,
                    subdomain=state.subdomain,
                    methods=self._methods,
                    strict_slashes=False,
                    merge_slashes=False,
                )
            )
        app.view_functions[endpoint] = self._view

    def _view(self, tus_id: str = "", **values: Any) -> TusResponse:
        # `values` are variables of the embedding application's URL prefix.
        return TusResponse(self.answer(flask.request.environ, tus_id))

    def answer(self, environ: dict[str, Any], tus_id: str) -> Answer:
        """Return the answer to a request for an upload, for the collection if there is no id."""
        common = self._common_headers(environ)
        body: RequestBody | None = None
        try:
            body = body_of(environ)
            self._before_first()
            return self._answer(environ, tus_id.removesuffix("/"), body, common)
        except TusError as error:
            _log_error(environ, error)
            return error_response(error, common, body)
        except HTTPException:
            raise  # the application's own: its ``owner`` function aborts with 401
        except Exception as error:
            log.exception("%s %s failed", environ["REQUEST_METHOD"], environ.get("PATH_INFO"))
            # Too many open files is trouble that passes.
            passes = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
            return error_response(Unavailable() if passes else TusError(), common, body)

    def _answer(
        self, environ: dict[str, Any], id: str, body: RequestBody, common: Headers
    ) -> Answer:
        headers = TusHeaders(environ)
        # "The X-HTTP-Method-Override request header MUST be a string which MUST be
        # interpreted as the request's method by the Server [...]. The actual method of
        # the request MUST be ignored."
        method = (headers.get(METHOD_OVERRIDE) or environ["REQUEST_METHOD"]).strip().upper()
        methods = self._views.methods(id)
        if method not in methods:
            raise MethodNotAllowed(tuple(methods))
        if method not in ("OPTIONS", "GET"):
            headers.check_version()
        request = self._request_info(environ, method)
        return methods[method](Call(environ, id, headers, body, request, common))

    def _request_info(self, environ: Mapping[str, Any], method: str) -> RequestInfo:
        origin = origin_of(environ, self._settings)
        owner = self._owner(flask.request) if self._owner is not None else None
        if not self._uploads.hooks.hooks:
            return RequestInfo(method, owner=owner)
        port = environ.get("REMOTE_PORT", "") if origin.client == environ.get("REMOTE_ADDR") else ""
        return RequestInfo(
            method,
            request_uri(environ),
            origin.client,
            int(port) if port.isdecimal() else None,
            _headers(environ),
            owner,
        )

    def _common_headers(self, environ: Mapping[str, Any]) -> Headers:
        # "The Tus-Resumable header MUST be included in every request and response except
        # for OPTIONS requests."
        return [(TUS_RESUMABLE, VERSION), *self._cors.headers(environ)]

    def _complete(self, response: flask.Response) -> flask.Response:
        """Complete an answer that the embedding application gave in our place."""
        if isinstance(response, TusResponse):
            return response
        environ = flask.request.environ
        for name, value in self._common_headers(environ):
            if name == "Vary":
                response.vary.add(value)
            else:
                response.headers.setdefault(name, value)
        completed = cast(TusResponse, TusResponse.force_type(response))
        try:
            completed.request_body = body_of(environ)
        except TusError:
            completed.request_body = None  # its length is nonsense
        return completed


def _headers(environ: Mapping[str, Any]) -> dict[str, str]:
    """Return all headers of a request, with names in lower case."""
    names = {key: key[5:] for key in environ if key.startswith("HTTP_")}
    names |= {key: key for key in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(key)}
    return {name.replace("_", "-").lower(): environ[key] for key, name in names.items()}


def _log_error(environ: Mapping[str, Any], error: TusError) -> None:
    # Clients that go away or fall silent are what this protocol is made for.
    is_ours = error.status >= 500 and not isinstance(error, (BodyIncomplete, ReadTimeout))
    # Where in the code a disk turned out to be full is of no use to anybody.
    is_puzzling = is_ours and not isinstance(error, StorageFull)
    log.log(
        logging.WARNING if is_ours else logging.DEBUG,
        "%s %s: %s %s",
        environ["REQUEST_METHOD"],
        environ.get("PATH_INFO"),
        error.code,
        error.message,
        exc_info=error.__cause__ if is_puzzling else None,
    )
