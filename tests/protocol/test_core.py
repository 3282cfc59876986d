"""The core protocol: OPTIONS, versions, methods, HEAD, PATCH, and errors of the server."""

from __future__ import annotations

import errno
import threading
from typing import Any

import flask
import pytest

from protocol.client import MIME, Breaking, Client, assert_refused, metadata
from protocol.conftest import Serve, on_memory
from protocol.test_headers import NO_NUMBERS
from tuswsgi.app import Tus
from tuswsgi.core.extensions import Extension
from tuswsgi.datastores.memory import MemoryDataStore
from tuswsgi.hooks.base import HookRequest, HookResponse

#: What an HTTP client can send at all.
SENDABLE = [text for text in NO_NUMBERS if text.isprintable() and text == text.strip(" ")]


@on_memory
class TestOptions:
    @pytest.mark.parametrize("url", ["/files", "/files/", "/files/some-upload"])
    def test_it_describes_the_server(self, client: Client, url: str) -> None:
        # "A successful response indicated by the 204 No Content or 200 OK status MUST
        # contain the Tus-Version header."
        response = client.options(url)
        assert response.status_code == 204
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.headers["Tus-Version"] == "1.0.0"
        assert response.headers["Tus-Extension"] == (
            "creation,creation-with-upload,creation-defer-length,checksum,checksum-trailer,"
            "termination,concatenation,concatenation-unfinished,getting"
        )
        assert "Tus-Max-Size" not in response.headers
        algorithms = response.headers["Tus-Checksum-Algorithm"].split(",")
        assert {"sha1", "md5", "crc32", "sha256", "sha512"} <= set(algorithms)
        assert response.data == b""

    def test_the_largest_size(self, serve: Serve) -> None:
        assert serve(max_file_size="5KiB").options().headers["Tus-Max-Size"] == "5120"

    def test_expiration_is_told_if_it_is_set(self, serve: Serve) -> None:
        extensions = serve(expiration="7d").options().headers["Tus-Extension"]
        assert "expiration" in extensions.split(",")

    @pytest.mark.parametrize("version", [None, "0.2.2", "nonsense"])
    def test_the_version_is_ignored(self, client: Client, version: str | None) -> None:
        # "the Server MUST ignore the header" (OPTIONS)
        assert client.options(Tus_Resumable=version).status_code == 204

    def test_no_extensions_no_header(self, serve: Serve) -> None:
        # "If no extensions are supported, the Tus-Extension header MUST be omitted."
        response = serve(tus_extensions=()).options()
        assert "Tus-Extension" not in response.headers
        assert "Tus-Checksum-Algorithm" not in response.headers


@on_memory
class TestVersion:
    @pytest.mark.parametrize("version", [None, "0.2.2", "1.0.1", "1.0.0,1.0.0", ""])
    @pytest.mark.parametrize("method", ["HEAD", "PATCH", "DELETE"])
    def test_others_are_refused(self, client: Client, method: str, version: str | None) -> None:
        # "it MUST respond with the 412 Precondition Failed status and MUST include the
        # Tus-Version header into the response. In addition, the Server MUST NOT process
        # the request."
        url = client.create(5)
        response = client.request(
            method, url, b"hello", Tus_Resumable=version, Content_Type=MIME, Upload_Offset=0
        )
        assert_refused(response, 412)
        assert response.headers["Tus-Version"] == "1.0.0"
        assert client.offset(url) == 0

    @pytest.mark.parametrize("version", [None, "0.2.2"])
    def test_others_create_nothing(self, client: Client, version: str | None) -> None:
        response = client.post(5, Tus_Resumable=version)
        assert_refused(response, 412, "Tus-Resumable")
        assert response.headers["Tus-Version"] == "1.0.0"
        assert client.stored() == 0

    def test_it_comes_before_everything_else(self, client: Client) -> None:
        assert_refused(client.head("/files/unknown", Tus_Resumable=None), 412)
        assert_refused(client.post(-1, Tus_Resumable=None), 412)

    def test_downloads_need_none(self, client: Client) -> None:
        url = client.create(5, b"hello")
        for version in (None, "0.2.2"):
            assert client.get(url, Tus_Resumable=version).data == b"hello"


@on_memory
class TestHeadOfADownload:
    """Browsers and ``curl -I`` know nothing of Tus-Resumable."""

    def test_it_says_what_get_would(self, client: Client) -> None:
        raw = metadata(filename="a.png", filetype="image/png")
        url = client.create(5, b"hello", Upload_Metadata=raw)
        head, get = client.head(url, Tus_Resumable=None), client.get(url)
        assert (head.status_code, head.data) == (200, b"")
        assert dict(get.headers).items() <= dict(head.headers).items()
        assert head.headers["Content-Length"] == "5"
        assert head.headers["Upload-Offset"] == head.headers["Upload-Length"] == "5"
        tag = get.headers["ETag"]
        assert client.head(url, Tus_Resumable=None, If_None_Match=tag).status_code == 304
        assert_refused(client.head(url, Tus_Resumable=None, If_Match='"x"'), 412)
        # "A server MUST ignore a Range header field received with a request method that is
        # unrecognized or for which range handling is not defined." (RFC 9110, 14.2)
        assert client.head(url, Tus_Resumable=None, Range="bytes=0-1").status_code == 200

    def test_another_version_is_refused(self, client: Client) -> None:
        url = client.create(5, b"hello")
        assert_refused(client.head(url, Tus_Resumable="0.2.2"), 412)

    def test_where_there_is_nothing_to_download(self, serve: Serve) -> None:
        client = serve(download_unfinished=True)
        removed = client.create(5, b"hello")
        client.delete(removed)
        for url in (client.create(5, b"hel"), removed, "/files/unknown"):
            response = client.head(url, Tus_Resumable=None)
            assert_refused(response, 412)
            assert response.headers["Tus-Version"] == "1.0.0"

    def test_where_downloads_are_switched_off(self, serve: Serve) -> None:
        client = serve(tus_extensions="creation,creation-with-upload")
        url = client.create(5, b"hello")
        assert_refused(client.head(url, Tus_Resumable=None), 412)

    def test_a_file_that_was_moved_away(self, client: Client) -> None:
        url, uploads = client.create(5, b"hello"), client.tus.uploads
        uploads.data.delete(uploads.infos.load(url.rpartition("/")[2]))
        assert_refused(client.head(url, Tus_Resumable=None), 410)

    def test_who_may_not_download_learns_nothing(self, embed: Any, app: flask.Flask) -> None:
        tus = embed()

        @tus.on("pre-get")
        def refuse(hook: HookRequest) -> HookResponse:
            return HookResponse(status=403, body="No.", reject=True)

        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        response = client.head(client.create(5, b"hello"), Tus_Resumable=None)
        assert response.status_code == 403
        assert "Upload-Length" not in response.headers

    def test_a_head_by_override_is_none(self, client: Client) -> None:
        # Its answer would have to have the body that its Content-Length announces.
        url = client.create(5, b"hello")
        response = client.request("POST", url, X_HTTP_Method_Override="HEAD")
        assert_refused(response, 412)


@on_memory
class TestAsInRustus:
    def test_nothing_needs_a_version(self, serve: Serve) -> None:
        client = serve(compat="rustus")
        url = client.create(5, Tus_Resumable=None)
        head = client.head(url, Tus_Resumable=None)
        assert (head.status_code, head.headers["Upload-Offset"]) == (200, "0")
        client.append(url, b"hello", 0, Tus_Resumable=None)
        finished = client.head(url, Tus_Resumable=None)
        assert finished.headers["Upload-Offset"] == "5"
        assert finished.headers["Cache-Control"] == "no-store"
        assert client.delete(url, Tus_Resumable=None).status_code == 204

    def test_another_version_is_refused(self, serve: Serve) -> None:
        client = serve(compat="rustus")
        assert_refused(client.post(5, Tus_Resumable="0.2.2"), 412)


@on_memory
class TestMethods:
    @pytest.mark.parametrize("override", ["PATCH", "patch", " Patch "])
    def test_an_override_comes_first(self, client: Client, override: str) -> None:
        # "The X-HTTP-Method-Override request header MUST be a string which MUST be
        # interpreted as the request's method by the Server, if the header is presented.
        # The actual method of the request MUST be ignored."
        url = client.create(5)
        response = client.request(
            "POST",
            url,
            b"hello",
            Tus_Resumable="1.0.0",
            Content_Type=MIME,
            Upload_Offset=0,
            X_HTTP_Method_Override=override,
        )
        assert response.status_code == 204
        assert client.content(url) == b"hello"

    def test_every_method_can_be_overridden(self, client: Client) -> None:
        url = client.create(5, b"hello")
        override = {"Tus_Resumable": "1.0.0"}
        head = client.request("POST", url, X_HTTP_Method_Override="HEAD", **override)
        assert head.headers["Upload-Offset"] == "5"
        got = client.request("POST", url, X_HTTP_Method_Override="GET")
        assert got.data == b"hello"
        options = client.request("POST", url, X_HTTP_Method_Override="OPTIONS")
        assert options.headers["Tus-Version"] == "1.0.0"
        created = client.request(
            "PUT", "/files", X_HTTP_Method_Override="POST", Upload_Length=1, **override
        )
        assert created.status_code == 201
        deleted = client.request("POST", url, X_HTTP_Method_Override="DELETE", **override)
        assert deleted.status_code == 204
        assert_refused(client.head(url), 410)

    def test_the_actual_method_is_ignored(self, client: Client) -> None:
        url = client.create(5, b"hello")
        response = client.delete(url, X_HTTP_Method_Override="HEAD")
        assert response.status_code == 200
        assert client.offset(url) == 5

    @pytest.mark.parametrize("override", ["PUT", "FOO", "PATCH, DELETE", "é", "\0"])
    def test_an_override_that_is_no_method(self, client: Client, override: str) -> None:
        url = client.create(5)
        response = client.patch(url, b"hello", 0, environ={"HTTP_X_HTTP_METHOD_OVERRIDE": override})
        assert_refused(response, 405)
        assert client.offset(url) == 0

    @pytest.mark.parametrize("method", ["PUT", "FOO", "POST", "TRACE"])
    def test_methods_of_an_upload(self, client: Client, method: str) -> None:
        response = client.request(method, client.create(5), Tus_Resumable="1.0.0")
        assert_refused(response, 405)
        allowed = {name.strip() for name in response.headers["Allow"].split(",")}
        assert allowed == {"OPTIONS", "HEAD", "PATCH", "GET", "DELETE"}

    @pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "PATCH", "DELETE", "CONNECT"])
    @pytest.mark.parametrize("url", ["/files", "/files/"])
    def test_methods_of_the_collection(self, client: Client, method: str, url: str) -> None:
        response = client.request(method, url, Tus_Resumable="1.0.0")
        assert_refused(response, 405)
        allowed = {name.strip() for name in response.headers["Allow"].split(",")}
        assert allowed == {"OPTIONS", "POST"}


class TestHead:
    def test_where_an_upload_is(self, client: Client) -> None:
        url = client.create(11, b"hello", Upload_Metadata="k,filename YQ==")
        response = client.head(url)
        assert response.status_code == 200
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.headers["Upload-Offset"] == "5"
        assert response.headers["Upload-Length"] == "11"
        assert response.headers["Upload-Metadata"] == "k,filename YQ=="
        assert "no-store" in response.headers["Cache-Control"]
        for absent in ("Upload-Defer-Length", "Upload-Concat", "Upload-Expires"):
            assert absent not in response.headers
        assert response.data == b""

    @pytest.mark.parametrize("data", [b"", b"hello"])
    def test_it_does_not_say_that_get_sends_nothing(self, client: Client, data: bytes) -> None:
        url = client.create(5, data)
        for response in (
            client.head(url),
            client.head(url, Tus_Resumable="0.2.2"),
            client.head("/files/unknown"),
            client.request("HEAD", "/files"),
        ):
            assert "Content-Length" not in response.headers
        assert client.get("/files/unknown").headers["Content-Length"] != "0"
        # This one is read as what it is on the wire.
        overridden = client.request(
            "POST", url, Tus_Resumable="1.0.0", X_HTTP_Method_Override="HEAD"
        )
        assert overridden.headers["Content-Length"] == "0"

    def test_offset_0_and_the_end_are_told(self, client: Client) -> None:
        # "The Server MUST always include the Upload-Offset header in the response for a
        # HEAD request, even if the offset is 0, or the upload is already considered
        # completed."
        url = client.create(5)
        assert client.offset(url) == 0
        client.append(url, b"hello", 0)
        assert client.offset(url) == 5

    def test_who_is_not_there(self, client: Client) -> None:
        response = client.head("/files/unknown")
        assert_refused(response, 404)
        assert "Upload-Offset" not in response.headers


class TestPatch:
    def test_bytes_are_appended(self, client: Client) -> None:
        url = client.create(11)
        response = client.patch(url, b"hello", 0)
        assert response.status_code == 204
        assert response.headers["Upload-Offset"] == "5"
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.data == b""
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    def test_a_chunked_body(self, client: Client) -> None:
        url = client.create(11)
        client.append(url, b"hello", 0, chunked=True)
        client.append(url, b" world", 5, chunked=True)
        assert client.content(url) == b"hello world"

    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("data", [b"", b"hello"])
    def test_no_bytes(self, client: Client, chunked: bool, data: bytes) -> None:
        url = client.create(5, data)
        for _ in range(2):
            client.append(url, b"", len(data), chunked=chunked)
        assert client.offset(url) == len(data)

    @pytest.mark.parametrize("offset", [0, 4, 6, 11, 2**63 - 1])
    @pytest.mark.parametrize("data", [b"", b"x", b"xxxxxxxx"])
    def test_a_wrong_offset(self, client: Client, offset: int, data: bytes) -> None:
        # "If the offsets do not match, the Server MUST respond with the 409 Conflict
        # status without modifying the upload resource."
        url = client.create(11, b"hello")
        response = client.patch(url, data, offset)
        assert_refused(response, 409, "Upload-Offset")
        assert response.headers["Upload-Offset"] == "5"
        assert client.offset(url) == 5
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    @pytest.mark.parametrize("offset", [0, 4, 6])
    def test_a_wrong_offset_of_a_finished_upload(self, client: Client, offset: int) -> None:
        url = client.create(5, b"hello")
        for data in (b"", b"x"):
            response = client.patch(url, data, offset)
            assert_refused(response, 409)
            assert response.headers["Upload-Offset"] == "5"
        assert client.content(url) == b"hello"

    @on_memory
    @pytest.mark.parametrize("text", SENDABLE, ids=lambda text: repr(text)[:25])
    def test_an_offset_that_is_no_number(self, client: Client, text: str) -> None:
        url = client.create(5)
        response = client.patch(
            url, b"hello", 0, environ={"HTTP_UPLOAD_OFFSET": text.encode().decode("latin-1")}
        )
        assert_refused(response, 400, "Upload-Offset")
        assert client.offset(url) == 0

    def test_no_offset(self, client: Client) -> None:
        url = client.create(5)
        assert_refused(client.patch(url, b"hello", 0, Upload_Offset=None), 400, "Upload-Offset")
        assert client.offset(url) == 0

    def test_a_repeated_offset(self, client: Client) -> None:
        url = client.create(5)
        assert_refused(client.patch(url, b"hello", "0, 0"), 400, "Upload-Offset")
        assert_refused(client.patch(url, b"hello", "0,0"), 400, "Upload-Offset")

    @on_memory
    @pytest.mark.parametrize(
        "type", [None, "application/octet-stream", "text/plain", "multipart/form-data"]
    )
    @pytest.mark.parametrize("data", [b"", b"hello"])
    def test_another_content_type(self, client: Client, type: str | None, data: bytes) -> None:
        # "All PATCH requests MUST use Content-Type: application/offset+octet-stream,
        # otherwise the server SHOULD return a 415 Unsupported Media Type status."
        url = client.create(5)
        assert_refused(client.patch(url, data, 0, Content_Type=type), 415, "Content-Type")
        assert client.offset(url) == 0

    def test_who_is_not_there(self, client: Client) -> None:
        response = client.patch("/files/unknown", b"hello", 0)
        assert_refused(response, 404)
        assert "Upload-Offset" not in response.headers

    @pytest.mark.parametrize("data", [b"6bytes", b"x" * 1000])
    def test_more_than_the_length(self, client: Client, data: bytes) -> None:
        url = client.create(5)
        assert_refused(client.patch(url, data, 0), 413)
        assert client.offset(url) == 0

    def test_more_than_the_rest(self, client: Client) -> None:
        url = client.create(5, b"hell")
        assert_refused(client.patch(url, b"oo", 4), 413)
        assert client.offset(url) == 4

    def test_a_chunked_body_that_is_too_long(self, client: Client) -> None:
        # Where it ends is only known when it has; what belongs to the upload is kept.
        url = client.create(5)
        assert_refused(client.patch(url, b"hello!", 0, chunked=True), 413)
        assert client.offset(url) <= 5
        finished = client.create(5, b"hello")
        assert_refused(client.patch(finished, b"!", 5, chunked=True), 413)
        assert client.content(finished) == b"hello"

    def test_a_finished_upload_takes_no_more(self, client: Client) -> None:
        url = client.create(5, b"hello")
        assert_refused(client.patch(url, b"!", 5), 413)
        assert client.content(url) == b"hello"

    def test_a_body_that_breaks_off(self, client: Client) -> None:
        # "The Server SHOULD always attempt to store as much of the received data as
        # possible." (PATCH)
        url = client.create(11)
        response = client.patch(
            url, b"", 0, environ={"CONTENT_LENGTH": "11", "wsgi.input": Breaking(b"hello")}
        )
        assert_refused(response, 503)
        assert response.headers["Retry-After"]
        assert client.offset(url) == 5
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    def test_a_first_body_that_breaks_off(self, client: Client) -> None:
        response = client.post(
            11,
            Content_Type=MIME,
            environ={"CONTENT_LENGTH": "11", "wsgi.input": Breaking(b"hello")},
        )
        assert response.status_code == 201
        assert response.headers["Upload-Offset"] == "5"
        assert client.offset(response.headers["Location"]) == 5

    def test_many_patches(self, client: Client) -> None:
        url = client.create(100)
        for offset in range(100):
            client.append(url, bytes([offset]), offset)
        assert client.content(url) == bytes(range(100))

    def test_an_upload_in_use(self, serve: Serve) -> None:
        client = serve(lock_timeout="20ms")
        url = client.create(5)
        asked = threading.Event()
        with client.tus.uploads.locker.lock(url.rpartition("/")[2], lambda reason: asked.set()):
            for response in (client.patch(url, b"hello", 0), client.head(url), client.delete(url)):
                assert_refused(response, 423)
                assert response.headers["Retry-After"]
            assert asked.is_set(), "the holder is asked to let go"
        assert client.offset(url) == 0

    def test_a_download_takes_no_lock(self, client: Client) -> None:
        url = client.create(5, b"hello")
        with client.tus.uploads.locker.lock(url.rpartition("/")[2], pytest.fail):
            assert client.content(url) == b"hello"


class TestStopping:
    def test_bodies_come_back_later(self, client: Client) -> None:
        url = client.create(5)
        client.tus.stop_uploads()
        for response in (client.patch(url, b"hello", 0), client.post(5, b"hello")):
            assert_refused(response, 503)
            assert response.headers["Retry-After"]
        assert client.offset(url) == 0
        assert client.stored() == 1


class TestHost:
    def test_http_1_1_needs_one(self, client: Client) -> None:
        for method, url in (("POST", "/files"), ("HEAD", "/files/x"), ("OPTIONS", "/files")):
            response = client.request(
                method,
                url,
                Tus_Resumable="1.0.0",
                Upload_Length=5,
                environ={"HTTP_HOST": "", "SERVER_PROTOCOL": "HTTP/1.1"},
            )
            assert_refused(response, 400, "Host")
        assert client.stored() == 0


class TestRoutes:
    @on_memory
    @pytest.mark.parametrize(
        "path",
        [
            "/files/..",
            "/files/.",
            "/files/.hidden",
            "/files/%2e%2e",
            "/files/%2E%2E%2Fetc",
            "/files/..%2f..%2fetc%2fpasswd",
            "/files/../secret",
            "/files/%2Fx",
            "/files//x",
            "/files/x//",
            "/files/a/b",
            "/files/%00",
            "/files/a%00b",
            "/files/%0a",
            "/files/%ff",
            "/files/%D0%BA",
            "/files/é",
            "/files/a b",
            "/files/a%5Cb",
            "/files/" + "x" * 129,
            "/files/" + "x" * 5000,
            "/files/~a",
            "/files/.tuswsgi",
            "/files/.tuswsgi/info.sqlite3",
            "/files/unknown",
            "/files/unknown/",
        ],
    )
    @pytest.mark.parametrize("method", ["HEAD", "PATCH", "GET", "DELETE"])
    def test_what_is_no_upload(self, client: Client, method: str, path: str) -> None:
        response = client.request(
            method,
            path,
            b"",
            Tus_Resumable="1.0.0",
            Content_Type=MIME,
            Upload_Offset=0,
            Origin="https://example.org",
        )
        assert_refused(response, 404)
        assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"

    @pytest.mark.parametrize("url", ["/files", "/files/", "/files//"])
    def test_creation_with_and_without_a_slash(self, client: Client, url: str) -> None:
        response = client.post(5, b"hello", url=url)
        assert response.status_code == 201
        assert "//" not in response.headers["Location"].partition("://")[2]
        assert client.content(response.headers["Location"]) == b"hello"

    def test_a_slash_at_the_end(self, client: Client) -> None:
        url = client.create(5)
        assert client.offset(f"{url}/") == 0

    @pytest.mark.parametrize("url", ["/", "/a/b", "/a/b/", "files"])
    def test_the_url_is_an_option(self, serve: Serve, url: str) -> None:
        client = serve(url=url)
        client.url = "/" + url.strip("/")
        created = client.create(5, b"hello")
        assert created.rpartition("/")[0] == client.url.rstrip("/")
        assert client.content(created) == b"hello"
        assert client.options().status_code == 204

    def test_what_is_outside_is_not_ours(self, client: Client) -> None:
        for path in ("/", "/filesx", "/other"):
            assert client.request("GET", path).status_code == 404


class Failing(MemoryDataStore):
    """A store on a broken disk."""

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self._methods = methods

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._methods:
            raise OSError(errno.EINVAL, "secret /path/of/the/disk")
        return super().__getattribute__(name)


@on_memory
class TestErrorsOfTheServer:
    @pytest.fixture
    def broken(self, embed: Any, app: flask.Flask) -> Any:
        def make(*methods: str) -> Client:
            tus: Tus = embed(data_store=Failing(*methods))
            app.register_blueprint(tus.blueprint(), url_prefix="/files")
            return Client(app, tus)

        return make

    def check(self, response: Any) -> None:
        assert_refused(response, 500)
        assert "secret" not in response.text
        assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"

    def test_a_place_that_cannot_be_made(self, broken: Any) -> None:
        client = broken("create")
        self.check(client.post(5, b"hello", Origin="https://example.org"))
        assert client.stored() == 0

    def test_bytes_that_cannot_be_kept(self, broken: Any) -> None:
        client = broken("append")
        url = client.create(5)
        self.check(client.patch(url, b"hello", 0, Origin="https://example.org"))

    def test_an_offset_that_cannot_be_told(self, broken: Any) -> None:
        client = broken("offset")
        url = client.create(5)
        self.check(client.head(url, Origin="https://example.org"))

    def test_bytes_that_cannot_be_read(self, broken: Any) -> None:
        client = broken("open")
        url = client.create(5, b"hello")
        self.check(client.get(url, Origin="https://example.org"))

    def test_bytes_that_cannot_be_removed(
        self, broken: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = broken("delete")
        url = client.create(5, b"hello")
        assert client.delete(url).status_code == 204
        assert client.head(url).status_code == 410
        assert "could not be removed" in caplog.text

    def test_a_finish_that_fails_is_tried_again(self, broken: Any) -> None:
        # Nobody is told an offset equal to the length before finishing worked.
        client = broken("finish")
        url = client.create(5)
        self.check(client.patch(url, b"hello", 0, Origin="https://example.org"))
        self.check(client.head(url, Origin="https://example.org"))
        client.tus.uploads.data._methods = ()
        assert client.offset(url) == 5
        assert client.content(url) == b"hello"

    def test_the_extensions_of_a_store(self, embed: Any, app: flask.Flask) -> None:
        class Plain(MemoryDataStore):
            extensions = frozenset({Extension.GETTING})

        tus = embed(data_store=Plain())
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        offered = client.options().headers["Tus-Extension"]
        assert offered == "creation,creation-with-upload,creation-defer-length,getting"
        assert_refused(client.post(5, Upload_Concat="partial"), 400, "Upload-Concat")
        assert_refused(client.delete(client.create(5)), 405)


def test_metadata_helper() -> None:
    assert metadata(a="b", c=b"") == "a Yg==,c "
