"""The blueprint in applications of others: prefixes, owners, two servers, nesting."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import flask
import pytest

import tuswsgi
from protocol.client import Client, assert_refused, path_of
from tuswsgi.app import Tus
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.events import HookName, HookType

Embed = Callable[..., Tus]


class TestMethods:
    @pytest.mark.parametrize("override", ["DELETE", " delete ", "Delete"])
    def test_an_application_sees_the_one_that_counts(
        self, embed: Embed, app: flask.Flask, override: str
    ) -> None:
        tus = embed()
        uploads = tus.blueprint()

        @uploads.before_request
        def forbid_deletion() -> None:
            if tuswsgi.request_method(flask.request) == "DELETE":
                flask.abort(403)

        app.register_blueprint(uploads, url_prefix="/files")
        client = Client(app, tus)
        url = client.create(5, b"hello")
        assert client.delete(url).status_code == 403
        for method in ("POST", "PATCH", "HEAD", "GET"):
            answer = client.request(
                method, url, Tus_Resumable="1.0.0", X_HTTP_Method_Override=override
            )
            assert answer.status_code == 403
        assert client.delete(url, X_HTTP_Method_Override="HEAD").status_code == 200
        assert client.content(url) == b"hello"


class TestPrefixes:
    @pytest.mark.parametrize("prefix", ["/files", "/files/", "/a/b/c", "/", None, "/ф"])
    def test_any(self, embed: Embed, app: flask.Flask, prefix: str | None) -> None:
        tus = embed()
        app.register_blueprint(tus.blueprint(), url_prefix=prefix)
        client = Client(app, tus, prefix or "/")
        assert client.options().status_code == 204
        url = client.create(5, b"hello")
        assert client.content(url) == b"hello"
        assert client.delete(url).status_code == 204
        assert_refused(client.head(url), 410)
        part = client.part(b"x")
        assert client.content(path_of(client.final(part, part))) == b"xx"

    def test_with_variables(self, embed: Embed, app: flask.Flask) -> None:
        tus = embed()
        app.register_blueprint(tus.blueprint(), url_prefix="/<tenant>/<int:n>/files")
        client = Client(app, tus, "/acme/7/files")
        url = client.create(5, b"hello")
        assert url.startswith("/acme/7/files/")
        assert client.content(url) == b"hello"
        part = client.part(b"x")
        assert client.content(path_of(client.final(part))) == b"x"
        other = part.replace("acme", "other")
        assert_refused(client.final(other), 400, "Upload-Concat")

    def test_nested(self, embed: Embed, app: flask.Flask) -> None:
        tus = embed()
        outer = flask.Blueprint("outer", __name__, url_prefix="/outer")
        seen: list[str | None] = []
        outer.before_request(lambda: seen.append(flask.request.endpoint))
        outer.register_blueprint(tus.blueprint(), url_prefix="/files")
        app.register_blueprint(outer, url_prefix="/app")
        client = Client(app, tus, "/app/files")
        url = client.create(5, b"hello")
        assert client.content(url) == b"hello"
        assert seen[0] is not None
        assert seen[0].startswith("outer.")

    def test_below_a_script(self, embed: Embed, app: flask.Flask) -> None:
        tus = embed()
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        mounted = {"SCRIPT_NAME": "/mounted"}
        location = client.post(1, b"x", environ=mounted, Upload_Concat="partial").headers[
            "Location"
        ]
        assert location.startswith("http://localhost/mounted/files/")
        final = client.final(location, environ=mounted)
        assert final.status_code == 201

    def test_beside_other_routes(self, embed: Embed, app: flask.Flask) -> None:
        tus = embed()
        app.add_url_rule("/files/about", "about", lambda: "about")
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        app.add_url_rule("/", "index", lambda: "index")
        client = Client(app, tus)
        assert client.get("/").text == "index"
        assert client.get("/files/about").text == "about"
        assert client.content(client.create(1, b"x")) == b"x"


class TestTwoServers:
    def test_in_one_application(
        self, embed: Embed, app: flask.Flask, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        large = embed(max_file_size=1000)
        small = embed(max_file_size=10, data_dir=str(tmp_path_factory.mktemp("small")))
        app.register_blueprint(large.blueprint(), url_prefix="/large")
        app.register_blueprint(small.blueprint(), url_prefix="/small")
        first, second = Client(app, large, "/large"), Client(app, small, "/small")
        assert first.options().headers["Tus-Max-Size"] == "1000"
        assert second.options().headers["Tus-Max-Size"] == "10"
        url = first.create(100, b"hello")
        assert_refused(second.post(100), 413)
        assert_refused(second.head(url.replace("large", "small")), 404)
        part = first.part(b"x")
        assert_refused(second.final(part), 400)

    def test_one_twice(self, embed: Embed, app: flask.Flask) -> None:
        tus = embed()
        blueprint = tus.blueprint()
        app.register_blueprint(blueprint, url_prefix="/one")
        app.register_blueprint(blueprint, url_prefix="/two", name="again")
        url = Client(app, tus, "/one").create(5, b"hello")
        assert url.startswith("/one/")
        second = Client(app, tus, "/two")
        assert second.content(url.replace("one", "two")) == b"hello"
        assert second.create(5).startswith("/two/")

    def test_names_are_unique(self, embed: Embed, app: flask.Flask) -> None:
        for number in range(3):
            app.register_blueprint(embed().blueprint(), url_prefix=f"/{number}")


class TestOwners:
    @pytest.fixture
    def client(self, embed: Embed, app: flask.Flask) -> Client:
        tus = embed(owner=lambda request: request.headers.get("X-User"))
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        return Client(app, tus)

    @pytest.mark.parametrize("user", ["bob", None, ""])
    def test_nobody_else_finds_an_upload(self, client: Client, user: str | None) -> None:
        url = client.create(5, b"hel", X_User="ann")
        for response in (
            client.head(url, X_User=user),
            client.patch(url, b"lo", 3, X_User=user),
            client.get(url, X_User=user),
            client.delete(url, X_User=user),
        ):
            assert_refused(response, 404, "There is no upload")
        assert client.patch(url, b"lo", 3, X_User="ann").status_code == 204
        assert client.get(url, X_User="ann").data == b"hello"
        client.delete(url, X_User="ann")
        assert_refused(client.head(url, X_User="ann"), 410)
        assert_refused(client.head(url, X_User=user), 404)

    def test_parts_too(self, client: Client) -> None:
        part = client.create(1, b"x", Upload_Concat="partial", X_User="ann")
        assert_refused(client.final(part, X_User="bob"), 404, "Upload-Concat")
        final = client.final(part, X_User="ann")
        assert final.status_code == 201
        assert client.get(path_of(final), X_User="ann").data == b"x"
        assert_refused(client.head(path_of(final), X_User="bob"), 404)

    def test_nobodys_uploads_are_everybodys(self, client: Client) -> None:
        url = client.create(5)
        assert client.head(url, X_User="bob").status_code == 200

    def test_an_owner_function_that_fails(self, embed: Embed, app: flask.Flask) -> None:
        def fail(request: flask.Request) -> str:
            raise RuntimeError("secret")

        tus = embed(owner=fail)
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        response = Client(app, tus).post(5)
        assert_refused(response, 500)
        assert "secret" not in response.text


class TestExtendedApplications:
    """What is added to the application of ``create_app`` is asked about uploads, too."""

    @pytest.fixture
    def client(self, serve: Callable[..., Client]) -> Client:
        return serve()

    @pytest.fixture
    def app(self, client: Client) -> flask.Flask:
        return client.app

    def test_before_request(self, client: Client, app: flask.Flask) -> None:
        app.before_request(lambda: flask.abort(403))
        assert client.post(5).status_code == 403

    def test_after_request(self, client: Client, app: flask.Flask) -> None:
        @app.after_request
        def mark(response: flask.Response) -> flask.Response:
            response.headers["X-Mark"] = "seen"
            return response

        assert client.post(5).headers["X-Mark"] == "seen"

    def test_signals(self, client: Client, app: flask.Flask) -> None:
        seen: list[flask.Flask] = []
        with flask.request_started.connected_to(seen.append, app):
            client.post(5)
        assert seen == [app]

    def test_teardown(self, client: Client, app: flask.Flask) -> None:
        seen: list[str] = []
        app.teardown_request(lambda error: seen.append("request"))
        app.teardown_appcontext(lambda error: seen.append("appcontext"))
        client.post(5)
        assert seen == ["request", "appcontext"]

    def test_a_rule(self, client: Client, app: flask.Flask) -> None:
        app.add_url_rule("/files/about", "about", lambda: "about")
        assert client.get("/files/about").text == "about"

    def test_trusted_hosts(self, client: Client, app: flask.Flask) -> None:
        app.config["TRUSTED_HOSTS"] = ["example.com"]
        assert client.post(5).status_code == 400
        assert client.post(5, Host="example.com").status_code == 201


class TestOptions:
    def test_mistakes_are_told_at_once(self, embed: Embed) -> None:
        with pytest.raises(ConfigurationError, match="max_file_size") as error:
            embed(max_file_size="large", expiration="never")
        assert "expiration" in str(error.value)
        with pytest.raises(ConfigurationError, match="no option max_fil"):
            embed(max_fil=1)

    def test_a_locker_by_its_name(self, embed: Embed) -> None:
        with pytest.raises(ConfigurationError, match="locker"):
            embed(locker="no-locker")


def test_the_package_says_what_is_public() -> None:
    assert set(tuswsgi.__all__) <= set(dir(tuswsgi))
    for name in tuswsgi.__all__:
        assert getattr(tuswsgi, name) is not None
        assert re.search(rf"^- (.*, )?{name}(,.*)?: ", tuswsgi.__doc__ or "", re.MULTILINE), name
    assert tuswsgi.__version__ == version("tuswsgi-server")


class TestKeywords:
    def test_messages_name_the_keyword(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Tus(max_file_size="huge", network_timeout=-1)
        assert "from the keyword max_file_size" in str(caught.value)
        assert "from the keyword network_timeout" in str(caught.value)
        assert "--" not in str(caught.value)

    def test_durations_and_paths_are_pythons(self, embed: Embed, tmp_path: Path) -> None:
        tus = embed(expiration=timedelta(days=7), data_dir=tmp_path / "uploads")
        assert tus.config["expiration"] == 7 * 86400
        assert tus.config["data_dir"] == tmp_path / "uploads"

    def test_type_checkers_know_the_hooks(self) -> None:
        assert get_args(HookName) == tuple(type.value for type in HookType)
