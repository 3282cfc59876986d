"""Creation, creation-with-upload and creation-defer-length; sizes, metadata, Location."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.client import MIME, Client, assert_refused, metadata, path_of
from protocol.conftest import Serve, on_memory
from protocol.test_core import SENDABLE
from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import MAX_SIZE


class TestPost:
    def test_an_upload_is_created(self, client: Client) -> None:
        response = client.post(100)
        assert response.status_code == 201
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.data == b""
        id = response.headers["Location"].removeprefix("http://localhost/files/")
        assert len(id) >= 22
        assert client.offset(path_of(response)) == 0

    def test_ids_are_never_the_same(self, client: Client) -> None:
        assert len({client.create(1) for _ in range(50)}) == 50

    @on_memory
    @pytest.mark.parametrize("text", SENDABLE, ids=lambda text: repr(text)[:25])
    def test_a_length_that_is_no_number(self, client: Client, text: str) -> None:
        response = client.post(environ={"HTTP_UPLOAD_LENGTH": text.encode().decode("latin-1")})
        assert_refused(response, 400, "Upload-Length")
        assert client.stored() == 0

    def test_no_length(self, client: Client) -> None:
        assert_refused(client.post(), 400, "Upload-Length", "Upload-Defer-Length")
        assert client.stored() == 0

    @pytest.mark.parametrize("name", ["Upload-Length", "Upload-Defer-Length"])
    def test_a_repeated_header(self, client: Client, name: str) -> None:
        assert_refused(client.post(**{name: "1,1"}), 400, name)
        assert_refused(client.post(**{name: "1, 1"}), 400, name)
        assert client.stored() == 0

    def test_the_largest_length(self, serve: Serve) -> None:
        client = serve(storage="memory-storage")
        url = client.create(MAX_SIZE)
        assert client.head(url).headers["Upload-Length"] == str(MAX_SIZE)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_an_empty_upload_is_complete_at_once(self, serve: Serve, chunked: bool) -> None:
        # "Such an upload is immediately complete after its creation without transferring
        # data using PATCH requests."
        client = serve(expiration="1d")
        finished: list[str] = []
        client.tus.on("pre-finish")(lambda asked: finished.append(asked.info.id))
        type = MIME if chunked else None
        response = client.post(0, chunked=chunked, Content_Type=type)
        assert response.status_code == 201
        assert response.headers["Upload-Offset"] == "0"
        assert "Upload-Expires" not in response.headers
        url = path_of(response)
        assert client.content(url) == b""
        assert client.offset(url) == 0
        client.append(url, b"", 0)
        assert finished == [url.rpartition("/")[2]]

    def test_empty_uploads_may_be_forbidden(self, serve: Serve) -> None:
        client = serve(allow_empty=False)
        assert_refused(client.post(0), 400, "length 0")
        assert client.stored() == 0
        url = client.create(Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"", 0, Upload_Length=0), 400, "length 0")
        client.append(url, b"x", 0, Upload_Length=1)
        assert client.content(url) == b"x"


class TestWithUpload:
    @pytest.mark.parametrize("chunked", [False, True])
    def test_the_first_bytes(self, client: Client, chunked: bool) -> None:
        response = client.post(11, b"hello", chunked=chunked)
        assert response.status_code == 201
        # "MUST include the Upload-Offset header in the response and MUST set its value to
        # the offset of the upload after applying the accepted bytes."
        assert response.headers["Upload-Offset"] == "5"
        url = path_of(response)
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    @pytest.mark.parametrize("chunked", [False, True])
    def test_all_bytes(self, client: Client, chunked: bool) -> None:
        response = client.post(5, b"hello", chunked=chunked)
        assert response.headers["Upload-Offset"] == "5"
        assert client.content(path_of(response)) == b"hello"

    @on_memory
    @pytest.mark.parametrize("type", [None, "application/octet-stream", "text/plain"])
    def test_another_content_type(self, client: Client, type: str | None) -> None:
        # "The Client MUST include the Content-Type: application/offset+octet-stream header."
        assert_refused(client.post(5, b"hello", Content_Type=type), 415)
        assert client.stored() == 0

    def test_without_bytes_the_type_does_not_matter(self, client: Client) -> None:
        assert client.post(5, Content_Type="text/plain").status_code == 201

    @pytest.mark.parametrize("length", [0, 4])
    @pytest.mark.parametrize("chunked", [False, True])
    def test_too_many_bytes(self, client: Client, length: int, chunked: bool) -> None:
        assert_refused(client.post(length, b"hello", chunked=chunked), 413)
        assert client.stored() == 0


class TestDeferred:
    def test_the_length_comes_later(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        response = client.head(url)
        # "As long as the length of the upload is not known, the Server MUST set
        # Upload-Defer-Length: 1 in all responses to HEAD requests."
        assert response.headers["Upload-Defer-Length"] == "1"
        assert "Upload-Length" not in response.headers
        client.append(url, b"hello", 0)
        assert client.head(url).headers["Upload-Defer-Length"] == "1"
        client.append(url, b" w", 5, Upload_Length=11)
        response = client.head(url)
        assert response.headers["Upload-Length"] == "11"
        assert "Upload-Defer-Length" not in response.headers
        client.append(url, b"orld", 7)
        assert client.content(url) == b"hello world"

    def test_with_the_first_bytes(self, client: Client) -> None:
        response = client.post(data=b"hello", Upload_Defer_Length=1)
        assert response.headers["Upload-Offset"] == "5"
        url = path_of(response)
        client.append(url, b"", 5, Upload_Length=5)
        assert client.content(url) == b"hello"

    def test_the_length_is_saved_before_the_first_byte(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        broken = client.patch(
            url, b"", 0, Upload_Length=11, environ={"CONTENT_LENGTH": "5", "wsgi.input": Silent()}
        )
        assert_refused(broken, 503)
        assert client.head(url).headers["Upload-Length"] == "11"

    @pytest.mark.parametrize("length", [10, 12, 0, MAX_SIZE])
    def test_a_length_never_changes(self, client: Client, length: int) -> None:
        # "Once set the length MUST NOT be changed."
        for url in (client.create(11), client.create(Upload_Defer_Length=1)):
            client.append(url, b"hello", 0, Upload_Length=11)
            response = client.patch(url, b" world", 5, Upload_Length=length)
            assert_refused(response, 400, "Upload-Length")
            assert client.offset(url) == 5
            client.append(url, b" world", 5, Upload_Length=11)
            assert_refused(client.patch(url, b"", 11, Upload_Length=length), 400)
            client.append(url, b"", 11, Upload_Length=11)

    @pytest.mark.parametrize("length", [0, 4])
    def test_a_length_that_is_too_small(self, client: Client, length: int) -> None:
        url = client.create(data=b"hello", Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"", 5, Upload_Length=length), 400, "Upload-Length")
        assert client.head(url).headers["Upload-Defer-Length"] == "1"

    def test_more_bytes_than_the_new_length(self, client: Client) -> None:
        url = client.create(data=b"hello", Upload_Defer_Length=1)
        assert_refused(client.patch(url, b" world", 5, Upload_Length=10), 413)
        assert client.offset(url) == 5

    @on_memory
    @pytest.mark.parametrize("text", SENDABLE, ids=lambda text: repr(text)[:25])
    def test_a_length_that_is_no_number(self, client: Client, text: str) -> None:
        url = client.create(Upload_Defer_Length=1)
        response = client.patch(
            url, b"hello", 0, environ={"HTTP_UPLOAD_LENGTH": text.encode().decode("latin-1")}
        )
        assert_refused(response, 400, "Upload-Length")
        assert client.offset(url) == 0

    def test_a_wrong_offset_saves_no_length(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"x", 1, Upload_Length=5), 409)
        assert client.head(url).headers["Upload-Defer-Length"] == "1"

    @on_memory
    @pytest.mark.parametrize("value", ["0", "2", "true", "01"])
    def test_a_deferral_is_1(self, client: Client, value: str) -> None:
        # "If the Upload-Defer-Length header contains any other value than 1 the server
        # should return a 400 Bad Request status."
        assert_refused(client.post(Upload_Defer_Length=value), 400, "Upload-Defer-Length")
        assert_refused(client.post(5, Upload_Defer_Length=value), 400, "Upload-Defer-Length")
        assert client.stored() == 0

    def test_a_length_and_a_deferral(self, client: Client) -> None:
        assert_refused(client.post(5, Upload_Defer_Length=1), 400, "Upload-Defer-Length")
        assert client.stored() == 0


class Silent:
    """A body that breaks off before its first byte."""

    def read(self, n: int) -> bytes:
        raise OSError("connection reset by peer")


class TestSizes:
    @pytest.fixture
    def client(self, serve: Serve) -> Client:
        return serve(max_file_size=10)

    def test_a_length_beyond_the_largest(self, client: Client) -> None:
        # "If the length of the upload exceeds the maximum, which MAY be specified using
        # the Tus-Max-Size header, the Server MUST respond with the 413 Request Entity Too
        # Large status."
        assert client.post(10).status_code == 201
        assert_refused(client.post(11), 413)
        assert_refused(client.post(11, b"x"), 413)
        assert client.stored() == 1

    def test_a_deferred_length_beyond_the_largest(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"x", 0, Upload_Length=11), 413)
        assert client.head(url).headers["Upload-Defer-Length"] == "1"
        assert client.offset(url) == 0

    def test_bytes_of_a_deferred_length(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        client.append(url, b"x" * 6, 0)
        assert_refused(client.patch(url, b"x" * 5, 6), 413, "larger")
        assert client.offset(url) == 6
        client.append(url, b"x" * 4, 6, Upload_Length=10)
        assert client.content(url) == b"x" * 10

    def test_chunked_bytes_of_a_deferred_length(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"x" * 50, 0, chunked=True), 413, "larger")
        assert client.offset(url) <= 10

    @pytest.mark.parametrize("chunked", [False, True])
    def test_first_bytes_of_a_deferred_length(self, client: Client, chunked: bool) -> None:
        response = client.post(data=b"x" * 11, Upload_Defer_Length=1, chunked=chunked)
        assert_refused(response, 413, "larger")
        assert client.stored() == 0

    def test_final_uploads(self, client: Client) -> None:
        parts = [client.part(b"x" * 6) for _ in range(2)]
        assert client.final(parts[0]).status_code == 201
        assert_refused(client.final(*parts), 413)
        assert_refused(client.final(parts[0], parts[0]), 413)

    def test_final_uploads_of_parts_with_deferred_length(self, client: Client) -> None:
        parts = [client.create(Upload_Defer_Length=1, Upload_Concat="partial") for _ in range(2)]
        final = path_of(client.final(*parts))
        for part in parts:
            client.append(part, b"x" * 6, 0, Upload_Length=6)
        assert_refused(client.head(final), 413)
        assert_refused(client.get(final), 404)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_bodies(self, serve: Serve, chunked: bool) -> None:
        client = serve(max_body_size=4)
        assert_refused(client.post(20, b"hello", chunked=chunked), 413, "body")
        assert client.stored() == 0
        url = client.create(20, b"hell", chunked=chunked)
        assert_refused(client.patch(url, b"o wor", 4, chunked=chunked), 413, "body")
        offset = client.offset(url)
        assert offset == (8 if chunked else 4)
        client.append(url, b"o wo"[offset - 4 :], offset, chunked=chunked)
        assert client.offset(url) == 8

    def test_the_length_before_the_body(self, serve: Serve) -> None:
        client = serve(max_body_size=4)
        assert_refused(client.post(3, b"four", chunked=True), 413, "length")


class TestDisk:
    def test_without_room_nothing_is_created(self, options: dict[str, Any], serve: Serve) -> None:
        client = serve(storage="file-storage", min_free_disk="1000PiB")
        response = client.post(5, b"hello")
        assert_refused(response, 507)
        assert response.headers["Retry-After"]
        assert client.stored() == 0
        assert_refused(client.post(Upload_Defer_Length=1), 507)

    def test_the_length_counts(self, serve: Serve) -> None:
        client = serve(storage="file-storage", min_free_disk=0)
        assert_refused(client.post(2**60), 507)
        assert client.post(5).status_code == 201


class TestMetadata:
    @pytest.mark.parametrize(
        "raw",
        [
            "filename d29ybGRfZG9taW5hdGlvbl9wbGFuLnBkZg==,is_confidential",
            "is_confidential",
            "empty ,key",
            "z eg==,a YQ==,m bQ==",
            "b Yg==, a YQ== , c",
            "raw /wABCg0=",
            "text " + metadata(text="кошка").partition(" ")[2],
            "A QQ==,a YQ==",
            "a/b:c;d=e\"f' eA==",
            "long " + "QUJD" * 5000,
        ],
        ids=lambda raw: raw[:25],
    )
    def test_it_comes_back_byte_for_byte(self, client: Client, raw: str) -> None:
        # "responses to HEAD requests MUST include the Upload-Metadata header and its value
        # as specified by the Client during the creation."
        url = client.create(5, Upload_Metadata=raw)
        assert client.head(url).headers["Upload-Metadata"] == raw.strip()
        client.append(url, b"hello", 0)
        assert client.head(url).headers["Upload-Metadata"] == raw.strip()

    def test_an_empty_header(self, client: Client) -> None:
        # tuspy sends one.
        url = client.create(5, environ={"HTTP_UPLOAD_METADATA": ""})
        assert "Upload-Metadata" not in client.head(url).headers

    @on_memory
    @pytest.mark.parametrize(
        ("raw", "word"),
        [
            ("a YQ==,a Yg==", "repeats"),
            ("a,a", "repeats"),
            ("a %%%", "Base64"),
            ("a YQ", "Base64"),
            ("a b c", "Base64"),
            (",", "empty"),
            ("a YQ==,", "empty"),
            (",a YQ==", "empty"),
            ("\xd0\xba YQ==", "ASCII"),
            ("\xe9 YQ==", "ASCII"),
            ("a \xe9", "Base64"),
            ("a\tb YQ==", "ASCII"),
        ],
    )
    def test_faults(self, client: Client, raw: str, word: str) -> None:
        response = client.post(5, b"hello", environ={"HTTP_UPLOAD_METADATA": raw})
        assert_refused(response, 400, "Upload-Metadata", word)
        assert client.stored() == 0


@on_memory
class TestLocation:
    def test_absolute(self, client: Client) -> None:
        location = client.post(5, Host="example.org:8080").headers["Location"]
        assert location.startswith("http://example.org:8080/files/")
        secure = client.post(5, environ={"wsgi.url_scheme": "https"}).headers["Location"]
        assert secure.startswith("https://localhost/files/")

    def test_relative(self, serve: Serve) -> None:
        client = serve(location="relative")
        location = client.post(5, b"hello").headers["Location"]
        assert location.startswith("/files/")
        assert client.content(location) == b"hello"

    def test_public(self, serve: Serve) -> None:
        client = serve(public_url="https://example.org/up", behind_proxy=True)
        response = client.post(5, X_Forwarded_Host="other.org")
        assert response.headers["Location"].startswith("https://example.org/up/")

    def test_behind_a_proxy(self, serve: Serve) -> None:
        client = serve(behind_proxy=True)
        proxied = {
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "example.org",
            "X-Forwarded-Prefix": "/api",
        }
        location = client.post(5, **proxied).headers["Location"]
        assert location.startswith("https://example.org/api/files/")
        newer = client.post(5, Forwarded='for=1.2.3.4;proto=https;host="[2001:db8::1]:444"')
        assert newer.headers["Location"].startswith("https://[2001:db8::1]:444/files/")

    def test_nobody_is_believed_by_default(self, client: Client) -> None:
        response = client.post(5, X_Forwarded_Host="evil.org", Forwarded="host=evil.org")
        assert response.headers["Location"].startswith("http://localhost/files/")

    def test_strangers_are_not_believed(self, serve: Serve) -> None:
        client = serve(behind_proxy=True)
        stranger = {"REMOTE_ADDR": "203.0.113.7"}
        response = client.post(5, X_Forwarded_Host="evil.org", environ=stranger)
        assert response.headers["Location"].startswith("http://localhost/files/")

    def test_a_host_that_is_none(self, client: Client) -> None:
        assert_refused(client.post(5, b"hello", Host="a/b<c>"), 400, "Host")
        assert client.stored() == 0


class TestExtensions:
    """Each extension switched off: "a switched-off method is 405 with Allow, a header of a
    switched-off extension is 400"."""

    ALL = tuple(extension.value for extension in Extension)

    def without(self, serve: Serve, name: str) -> Client:
        left = [extension for extension in self.ALL if extension != name]
        client = serve(tus_extensions=",".join(left), expiration="1d")
        offered = client.options().headers["Tus-Extension"].split(",")
        assert name not in offered
        assert set(offered) <= set(left)
        return client

    def test_creation(self, serve: Serve) -> None:
        client = self.without(serve, "creation")
        # "if the Server does not offer the Creation extension, it MUST NOT offer the
        # Creation With Upload extension either."
        offered = client.options().headers["Tus-Extension"].split(",")
        assert offered == ["expiration", "checksum", "checksum-trailer", "termination", "getting"]
        response = client.post(5)
        assert_refused(response, 405)
        assert response.headers["Allow"] == "OPTIONS"
        assert client.stored() == 0

    def test_creation_with_upload(self, serve: Serve) -> None:
        client = self.without(serve, "creation-with-upload")
        assert_refused(client.post(5, b"hello"), 400, "creation-with-upload")
        assert_refused(client.post(5, b"hello", chunked=True), 400, "creation-with-upload")
        assert client.stored() == 0
        url = client.create(5)
        client.append(url, b"hello", 0)
        assert client.content(client.create(0)) == b""

    def test_creation_defer_length(self, serve: Serve) -> None:
        client = self.without(serve, "creation-defer-length")
        assert_refused(client.post(Upload_Defer_Length=1), 400, "Upload-Defer-Length")
        assert client.stored() == 0
        client.create(5)

    def test_expiration(self, serve: Serve) -> None:
        client = self.without(serve, "expiration")
        response = client.post(5)
        assert "Upload-Expires" not in response.headers
        assert "Upload-Expires" not in client.head(path_of(response)).headers

    def test_checksum(self, serve: Serve) -> None:
        client = self.without(serve, "checksum")
        response = client.options()
        assert "Tus-Checksum-Algorithm" not in response.headers
        assert "checksum-trailer" not in response.headers["Tus-Extension"]
        url = client.create(5)
        good = {"Upload-Checksum": "sha1 qvTGHdzF6KLavt4PO0gs2a6pQ00="}
        assert_refused(client.patch(url, b"hello", 0, **good), 400, "Upload-Checksum")
        assert_refused(client.patch(url, b"hello", 0, Trailer="Upload-Checksum"), 400)
        assert client.offset(url) == 0
        assert_refused(client.post(5, b"hello", **good), 400, "Upload-Checksum")
        assert client.stored() == 1

    def test_checksum_trailer(self, serve: Serve) -> None:
        client = self.without(serve, "checksum-trailer")
        url = client.create(5)
        response = client.patch(url, b"hello", 0, Trailer="Upload-Checksum", chunked=True)
        assert_refused(response, 400, "trailer")
        assert client.offset(url) == 0
        refused = client.post(5, b"hello", Trailer="Upload-Checksum", chunked=True)
        assert_refused(refused, 400, "trailer")
        assert client.stored() == 1

    def test_termination(self, serve: Serve) -> None:
        client = self.without(serve, "termination")
        url = client.create(5)
        response = client.delete(url)
        assert_refused(response, 405)
        assert response.headers["Allow"] == "OPTIONS, HEAD, PATCH, GET"
        assert client.offset(url) == 0

    @pytest.mark.parametrize("concat", ["partial", "final;/files/x"])
    def test_concatenation(self, serve: Serve, concat: str) -> None:
        client = self.without(serve, "concatenation")
        assert "concatenation-unfinished" not in client.options().headers["Tus-Extension"]
        assert_refused(client.post(5, Upload_Concat=concat), 400, "Upload-Concat")
        assert client.stored() == 0

    def test_concatenation_unfinished(self, serve: Serve) -> None:
        client = self.without(serve, "concatenation-unfinished")
        whole, half = client.part(b"hello"), client.part(b"wor", 5)
        assert_refused(client.final(whole, half), 400, "not finished")
        assert client.stored() == 2
        client.append(half, b"ld", 3)
        assert client.content(path_of(client.final(whole, half))) == b"helloworld"

    def test_getting(self, serve: Serve) -> None:
        client = self.without(serve, "getting")
        response = client.get(client.create(5, b"hello"))
        assert_refused(response, 405)
        assert response.headers["Allow"] == "OPTIONS, HEAD, PATCH, DELETE"
