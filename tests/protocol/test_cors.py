"""CORS: every answer, errors included, tells browsers what scripts may see."""

from __future__ import annotations

from typing import Any

import flask
import pytest

from protocol.client import MIME, Client
from protocol.conftest import Serve, on_memory
from tuswsgi.core.errors import ConfigurationError

ORIGIN = "https://app.example.org"


def words(text: str) -> set[str]:
    return {word.strip().lower() for word in text.split(",")}


class TestEveryAnswer:
    def test_of_every_kind(self, client: Client) -> None:
        url, done = client.create(5), client.create(5, b"hello")
        answers = {
            201: client.post(5, Origin=ORIGIN),
            204: client.options(Origin=ORIGIN),
            200: client.head(url, Origin=ORIGIN),
            206: client.get(done, Range="bytes=0-1", Origin=ORIGIN),
            304: client.get(done, If_None_Match="*", Origin=ORIGIN),
            400: client.post(Origin=ORIGIN),
            404: client.head("/files/unknown", Origin=ORIGIN),
            405: client.request("PUT", url, Origin=ORIGIN),
            409: client.patch(url, b"x", 1, Origin=ORIGIN),
            412: client.head(url, Tus_Resumable=None, Origin=ORIGIN),
            413: client.patch(url, b"x" * 6, 0, Origin=ORIGIN),
            415: client.patch(url, b"x", 0, Content_Type="text/plain", Origin=ORIGIN),
            416: client.get(done, Range="bytes=9-", Origin=ORIGIN),
            460: client.patch(url, b"x", 0, Upload_Checksum="crc32 AAAAAA==", Origin=ORIGIN),
        }
        for status, response in answers.items():
            assert response.status_code == status
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "origin" in words(response.headers["Vary"])
            exposed = words(response.headers["Access-Control-Expose-Headers"])
            assert {"location", "tus-resumable", "upload-offset", "upload-length"} <= exposed
            assert {"upload-metadata", "upload-expires", "tus-version", "retry-after"} <= exposed

    def test_of_the_application(self, embed: Any, app: flask.Flask) -> None:
        tus = embed()
        blueprint = tus.blueprint()

        @blueprint.before_request
        def refuse() -> tuple[str, int]:
            return "who are you?", 401

        app.register_blueprint(blueprint, url_prefix="/files")
        client = Client(app, tus)
        for response in (
            client.post(5, b"hello", Origin=ORIGIN),
            client.post(5, b"hello", Origin=ORIGIN, chunked=True),
            client.post(5, Origin=ORIGIN, environ={"CONTENT_LENGTH": "nonsense"}),
        ):
            assert response.status_code == 401
            assert response.text == "who are you?"
            assert response.headers["Tus-Resumable"] == "1.0.0"
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert client.stored() == 0

    def test_of_an_application_that_fails(self, embed: Any, app: flask.Flask) -> None:
        tus = embed()
        blueprint = tus.blueprint()

        @blueprint.before_request
        def fail() -> None:
            raise RuntimeError("secret")

        app.register_blueprint(blueprint, url_prefix="/files")
        response = Client(app, tus).post(5, Origin=ORIGIN)
        assert response.status_code == 500
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "secret" not in response.text

    def test_of_an_application_that_has_its_own(self, embed: Any, app: flask.Flask) -> None:
        tus = embed()
        blueprint = tus.blueprint()

        @blueprint.before_request
        def refuse() -> flask.Response:
            response = flask.Response("no", 403)
            response.headers["Access-Control-Allow-Origin"] = "https://only.example.org"
            response.headers["Vary"] = "Cookie"
            return response

        app.register_blueprint(blueprint, url_prefix="/files")
        response = Client(app, tus).post(5, Origin=ORIGIN)
        assert response.headers.getlist("Access-Control-Allow-Origin") == [
            "https://only.example.org"
        ]
        assert {"cookie", "origin"} <= words(",".join(response.headers.getlist("Vary")))


@on_memory
class TestOrigins:
    @pytest.mark.parametrize(
        ("patterns", "origin", "allowed"),
        [
            ("*", "https://anybody.org", True),
            ("*", "null", True),
            ("https://app.example.org", "https://app.example.org", True),
            ("https://app.example.org", "HTTPS://APP.EXAMPLE.ORG", True),
            ("https://app.example.org", "http://app.example.org", False),
            ("https://app.example.org", "https://app.example.org.evil.org", False),
            ("https://app.example.org", "https://app.example.org:8080", False),
            ("https://app.example.org", "https://appxexample.org", False),
            ("https://app.example.org", "null", False),
            ("https://*.example.org", "https://app.example.org", True),
            ("https://*.example.org", "https://a.b.example.org", True),
            ("https://*.example.org", "https://example.org", False),
            ("https://*.example.org", "https://app.example.org.evil.org", False),
            ("http://localhost:*", "http://localhost:3000", True),
            ("http://localhost:*", "http://localhost", False),
            ("https://a.org, https://b.org", "https://b.org", True),
            ("https://a.org, https://b.org", "https://c.org", False),
            ("", "https://a.org", False),
        ],
    )
    def test_patterns(self, serve: Serve, patterns: str, origin: str, allowed: bool) -> None:
        response = serve(cors=patterns).options(Origin=origin)
        assert response.status_code == 204
        if allowed:
            assert response.headers["Access-Control-Allow-Origin"] == origin
        else:
            for name in dict(response.headers):
                assert not name.startswith("Access-Control-")

    def test_caches_are_told(self, serve: Serve) -> None:
        client = serve(cors="https://a.org")
        for origin in ("https://a.org", "https://b.org", None):
            assert "origin" in words(client.options(Origin=origin).headers["Vary"])

    def test_switched_off(self, serve: Serve) -> None:
        response = serve(cors=()).options(Origin=ORIGIN)
        assert "Vary" not in response.headers

    def test_no_origin_no_permission(self, client: Client) -> None:
        response = client.options()
        for name in dict(response.headers):
            assert not name.startswith("Access-Control-")


@on_memory
class TestPreflight:
    def preflight(self, client: Client, url: str = "/files") -> Any:
        return client.options(
            url,
            Origin=ORIGIN,
            Access_Control_Request_Method="PATCH",
            Access_Control_Request_Headers="tus-resumable,upload-offset",
        )

    @pytest.mark.parametrize("url", ["/files", "/files/", "/files/some-upload"])
    def test_what_scripts_may_send(self, client: Client, url: str) -> None:
        response = self.preflight(client, url)
        assert response.status_code == 204
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        methods = words(response.headers["Access-Control-Allow-Methods"])
        assert methods == {"get", "head", "post", "patch", "delete", "options"}
        allowed = words(response.headers["Access-Control-Allow-Headers"])
        assert {
            "authorization",
            "content-type",
            "tus-resumable",
            "upload-checksum",
            "upload-concat",
            "upload-defer-length",
            "upload-length",
            "upload-metadata",
            "upload-offset",
            "x-http-method-override",
            "x-requested-with",
        } <= allowed
        assert response.headers["Access-Control-Max-Age"] == "86400"
        assert "Access-Control-Allow-Credentials" not in response.headers

    @pytest.mark.parametrize("prefix", ["/files", "/a/<tenant>/files"])
    def test_no_function_of_the_application_refuses_it(
        self, embed: Any, app: flask.Flask, prefix: str
    ) -> None:
        tus = embed()
        uploads = tus.blueprint()

        @app.before_request
        @uploads.before_request
        def require_login() -> None:
            if "Authorization" not in flask.request.headers:
                flask.abort(401)

        app.register_blueprint(uploads, url_prefix=prefix)
        url = prefix.replace("<tenant>", "b")
        client = Client(app, tus, url)
        response = self.preflight(client, url)
        assert response.status_code == 204
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "PATCH" in response.headers["Access-Control-Allow-Methods"]
        # Other requests are asked about, OPTIONS of a tus client among them.
        assert client.options(Origin=ORIGIN).status_code == 401
        assert client.post(5, Origin=ORIGIN).status_code == 401
        assert client.request("OPTIONS", "/", Origin=ORIGIN).status_code in (401, 404)

    def test_what_operators_add(self, serve: Serve) -> None:
        client = serve(
            cors_allow_headers="X-Token, X-Tenant",
            cors_expose_headers="X-Trace",
            cors=ORIGIN,
            cors_credentials=True,
            cors_max_age="1h",
        )
        response = self.preflight(client)
        assert {"x-token", "x-tenant"} <= words(response.headers["Access-Control-Allow-Headers"])
        assert response.headers["Access-Control-Max-Age"] == "3600"
        for answer in (response, client.head("/files/unknown", Origin=ORIGIN)):
            assert answer.headers["Access-Control-Allow-Credentials"] == "true"
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert "x-trace" in words(answer.headers["Access-Control-Expose-Headers"])

    @pytest.mark.parametrize("cors", [None, "*", "https://*", f"{ORIGIN},*", "HTTP://*", "**"])
    def test_credentials_are_for_origins_that_are_named(self, embed: Any, cors: str | None) -> None:
        given = {} if cors is None else {"cors": cors}
        with pytest.raises(ConfigurationError, match="Name the origins in cors") as caught:
            embed(cors_credentials=True, **given)
        assert str(caught.value).startswith("[tuswsgi] cors_credentials = true: With cors = ")
        assert "\n" not in str(caught.value)

    def test_credentials_are_for_no_origin_at_all(self, serve: Serve) -> None:
        assert (
            "Access-Control-Allow-Origin"
            not in self.preflight(serve(cors="", cors_credentials=True)).headers
        )

    def test_of_others(self, serve: Serve) -> None:
        response = self.preflight(serve(cors="https://other.org"))
        assert response.status_code == 204
        assert "Access-Control-Allow-Methods" not in response.headers

    def test_only_the_preflight_tells_what_may_be_sent(self, client: Client) -> None:
        response = client.post(5, Origin=ORIGIN, Content_Type=MIME)
        assert "Access-Control-Allow-Methods" not in response.headers
