"""The Flask blueprint: URL rules, dispatch by method, and responses to errors.

One rule takes every method. So all responses below the URL are ours, 404 and 405 too, and have
the headers that tus and browsers need.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

import flask
from flask.sansio.blueprints import BlueprintSetupState
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter, Rule

from tuswsgi.core.errors import MethodNotAllowed, TusError, Unavailable, is_temporary
from tuswsgi.core.events import RequestInfo, joined
from tuswsgi.observing.logs import CLIENT, REQUEST_ID, UPLOAD_ID, current_request, request_id
from tuswsgi.observing.telemetry import report, request_answered
from tuswsgi.protocol.uploads import Uploads
from tuswsgi.transfer.body import RequestBody
from tuswsgi.transfer.exchange import body_of
from tuswsgi.web.cors import Cors
from tuswsgi.web.headers import TUS_RESUMABLE, VERSION, TusHeaders
from tuswsgi.web.request_log import log_answer, log_failure
from tuswsgi.web.responses import Answer, Headers, TusResponse, error_response
from tuswsgi.web.settings import Compat, WebSettings
from tuswsgi.web.urls import Origin, origin_of, request_uri
from tuswsgi.web.views import Call, Views

_REQUEST_ID_HEADER = "X-Request-ID"

#: Logs show no longer ids; no upload has one.
_SHOWN = 128

#: The code of an error that the application responds to itself.
_ABORTED = "ERR_ABORTED"

#: Returns the user who sends a request, ``None`` for an anonymous one.
OwnerFunction = Callable[[flask.Request], "str | None"]


class _Rest(BaseConverter):
    """Any text, also with slashes, also empty."""

    regex = r"[\s\S]*?"
    part_isolating = False
    # Before an application's own rule for downloads, to which Flask adds HEAD.
    weight = 50


class TusBlueprint(flask.Blueprint):
    """The routes of one tus server.

    ``before_request`` functions of the embedding application run before any byte of a body is
    read, and their responses get the same headers as ours.

    :param start: called before each request; it starts the server at the first one.
    :param methods: the methods to serve, ``None`` for all.
    :param shows_request_id: whether every response has the request's id. A response always has it
        if the client sent one, or if the log has a line about the request.
    """

    def __init__(
        self,
        name: str,
        uploads: Uploads,
        settings: WebSettings,
        *,
        owner: OwnerFunction | None = None,
        start: Callable[[], object] = lambda: None,
        methods: Collection[str] | None = None,
        shows_request_id: bool = False,
    ) -> None:
        super().__init__(name, __name__)
        self._uploads = uploads
        self._settings = settings
        self._owner = owner
        self._start = start
        self._shows_request_id = shows_request_id
        self._methods = None if methods is None else {method.upper() for method in methods}
        self._views = Views(uploads, settings, self._methods)
        self._cors = Cors(settings)
        self.record(self._add_rules)
        self.after_request(self._complete)

    def _add_rules(self, state: BlueprintSetupState) -> None:
        # Werkzeug's own rules: Flask's would redirect /files, merge slashes and refuse unknown
        # methods themselves.
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
        # Before the application's own functions: a preflight has no credentials (Fetch standard,
        # "CORS-preflight fetch").
        first = app.before_request_funcs.setdefault(None, [])
        first.insert(0, partial(self._answer_preflight, endpoint))

    def _answer_preflight(self, endpoint: str) -> TusResponse | None:
        request = flask.request
        if (
            request.endpoint != endpoint
            or request.method != "OPTIONS"
            or "Access-Control-Request-Method" not in request.headers
        ):
            return None
        return self._view(**request.view_args or {})

    def _view(self, tus_id: str = "", **values: Any) -> TusResponse:
        # `values` are variables of the prefix.
        environ = flask.request.environ
        token = current_request.set(environ)
        try:
            return TusResponse(self.answer(environ, tus_id), environ)
        finally:
            current_request.reset(token)

    def answer(self, environ: dict[str, Any], path: str) -> Answer:
        """Return the response to a request, which the caller has made the current one.

        :param path: the part of the URL below the collection: an upload's id, maybe with a slash
            at its end, or nothing for the collection.
        """
        began = time.monotonic()
        id = path.removesuffix("/")
        common = self._common_headers(environ)
        has_request_id = REQUEST_ID in environ
        if len(id) <= _SHOWN and id.isascii() and id.isprintable():
            environ[UPLOAD_ID] = id
        body: RequestBody | None = None
        code: str | None = None
        headers = TusHeaders(environ)
        method = headers.method
        try:
            body = body_of(environ)
            self._start()
            answer = self._answer(environ, method, id, headers, body, common)
            log_answer(environ, method, answer.status, body, began)
        except TusError as error:
            code = error.code
            answer = error_response(error, common, body)
            log_answer(environ, method, answer.status, body, began, error)
        except HTTPException as error:
            # The application's own, e.g. if its ``owner`` function aborts with 401.
            if request_answered.receivers:
                self._report(method, error.code or 500, _ABORTED)
            raise
        except Exception as error:
            # For example too many open files, or a read-only disk.
            passes = isinstance(error, OSError) and is_temporary(error)
            failure = Unavailable() if passes else TusError()
            code = failure.code
            answer = error_response(failure, common, body)
            if passes:
                failure.__cause__ = error
                log_answer(environ, method, answer.status, body, began, failure)
            else:
                log_failure(environ, method, answer.status, body, began, error)
        if request_answered.receivers:
            self._report(method, answer.status, code)
        if REQUEST_ID in environ and not has_request_id:
            answer.headers.append((_REQUEST_ID_HEADER, request_id(environ)))
        return answer

    def _report(self, method: str, status: int, code: str | None) -> None:
        sender = self._uploads.context.sender
        report(request_answered, sender, method=method, status=status, code=code)

    def _answer(
        self,
        environ: dict[str, Any],
        method: str,
        id: str,
        headers: TusHeaders,
        body: RequestBody,
        common: Headers,
    ) -> Answer:
        headers.check_transfer_coding()
        view = self._view_for(environ, method, id, headers)
        origin = origin_of(environ, self._settings)
        environ[CLIENT] = origin.client
        request = self._request_info(environ, method, origin)
        return view(Call(environ, id, headers, body, request, common, origin))

    def _view_for(
        self, environ: dict[str, Any], method: str, id: str, headers: TusHeaders
    ) -> Callable[[Call], Answer]:
        methods = self._views.methods(id)
        if method not in methods:
            raise MethodNotAllowed(tuple(methods))
        if method in ("OPTIONS", "GET"):
            return methods[method]
        if not headers.names_version:
            if self._settings.compat is Compat.RUSTUS:
                return methods[method]
            # A method override expects a tus response.
            if method == environ["REQUEST_METHOD"] == "HEAD" and "GET" in methods:
                return self._views.head_of_download
        headers.check_version()
        return methods[method]

    def _request_info(self, environ: dict[str, Any], method: str, origin: Origin) -> RequestInfo:
        owner = self._owner(flask.request) if self._owner is not None else None
        if not self._uploads.hooks.hooks:
            return RequestInfo(method, owner=owner)
        repeated = _repeated(environ)
        headers = {name: joined(name, values) for name, values in repeated.items()}
        headers = dict(self._uploads.hooks.limit_headers(_headers(environ) | headers))
        port = ""
        if origin.client == environ.get("REMOTE_ADDR"):
            # Werkzeug's server has a number, against PEP 3333.
            port = str(environ.get("REMOTE_PORT", ""))
        return RequestInfo(
            method,
            request_uri(environ),
            origin.client,
            int(port) if port.isdecimal() else None,
            # As if the client had sent the id, so that every transport passes it on.
            headers | {"x-request-id": request_id(environ)},
            owner,
            {name: values for name, values in repeated.items() if name in headers},
        )

    def _common_headers(self, environ: dict[str, Any]) -> Headers:
        # "The Tus-Resumable header MUST be included in every request and response except
        # for OPTIONS requests."
        origin = environ.get("HTTP_ORIGIN")
        cors = self._cors.without_origin if origin is None else self._cors.headers(environ, origin)
        headers = [(TUS_RESUMABLE, VERSION), *cors]
        if self._shows_request_id or "HTTP_X_REQUEST_ID" in environ or REQUEST_ID in environ:
            headers.append((_REQUEST_ID_HEADER, request_id(environ)))
        return headers

    def _complete(self, response: flask.Response) -> flask.Response:
        """Complete a response that the embedding application gave instead of ours."""
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
            completed.request_body = None  # its length is malformed
        return completed


def request_method(request: flask.Request) -> str:
    """Return the method of a request for an upload, in upper case.

    For ``before_request`` functions: ``X-HTTP-Method-Override``, which tus clients may send,
    overrides ``request.method``.
    """
    return TusHeaders(request.environ).method


def _headers(environ: Mapping[str, Any]) -> dict[str, str]:
    """Return all headers of a request, with names in lower case."""
    names = {key: key[5:] for key in environ if key.startswith("HTTP_")}
    names |= {key: key for key in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(key)}
    return {name.replace("_", "-").lower(): environ[key] for key, name in names.items()}


def _repeated(environ: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the values of the headers that came more than once, with names in lower case.

    An environ has one string for all of them. Only our worker passes them separately.
    """
    values: dict[str, list[str]] = {}
    for name, value in getattr(environ["wsgi.input"], "request_fields", ()):
        values.setdefault(name.lower(), []).append(value)
    return {
        name: tuple(several)
        for name, several in values.items()
        if len(several) > 1 and name not in ("content-type", "x-request-id")
    }
