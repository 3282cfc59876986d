"""The extensions checksum and checksum-trailer."""

from __future__ import annotations

from base64 import b64encode

import pytest

from protocol.client import MIME, Breaking, Client, assert_refused, path_of
from protocol.conftest import on_memory
from tuswsgi.config.backends import Backends
from tuswsgi.transfer.checksum import ALGORITHMS


def checksum(algorithm: str, data: bytes) -> str:
    hash = ALGORITHMS[algorithm]()
    hash.update(data)
    return f"{algorithm} {b64encode(hash.digest()).decode()}"


def assert_nothing_left(client: Client) -> None:
    """Check that there is no file of bytes that do not count."""
    directory = Backends(client.tus.config).data_dir
    left = [path.name for path in directory.rglob(".*.unverified")]
    assert left == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("chunked", [False, True])
class TestEveryAlgorithm:
    def test_a_match(self, client: Client, algorithm: str, chunked: bool) -> None:
        assert algorithm in client.options().headers["Tus-Checksum-Algorithm"].split(",")
        url = client.create(11)
        for data, offset in ((b"hello", 0), (b" world", 5)):
            client.append(
                url, data, offset, Upload_Checksum=checksum(algorithm, data), chunked=chunked
            )
        assert client.content(url) == b"hello world"
        assert_nothing_left(client)

    def test_a_mismatch(self, client: Client, algorithm: str, chunked: bool) -> None:
        # "the uploaded chunk MUST be discarded, and the upload and its offset MUST NOT be
        # updated."
        url = client.create(11, b"hello")
        wrong = checksum(algorithm, b" World")
        response = client.patch(url, b" world", 5, Upload_Checksum=wrong, chunked=chunked)
        assert_refused(response, 460)
        assert response.status == "460 Checksum Mismatch"
        assert client.offset(url) == 5
        assert_nothing_left(client)
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"


class TestChecksum:
    def test_with_the_creation(self, client: Client) -> None:
        response = client.post(11, b"hello", Upload_Checksum=checksum("sha1", b"hello"))
        assert response.status_code == 201
        assert client.offset(path_of(response)) == 5

    def test_a_mismatch_with_the_creation(self, client: Client) -> None:
        response = client.post(11, b"hello", Upload_Checksum=checksum("sha1", b"Hello"))
        assert_refused(response, 460)
        assert client.stored() == 0

    @on_memory
    @pytest.mark.parametrize(
        ("header", "word"),
        [
            ("whirlpool qvTGHdzF6KLavt4PO0gs2a6pQ00=", "unsupported"),
            ("SHA1 qvTGHdzF6KLavt4PO0gs2a6pQ00=", "unsupported"),
            ("qvTGHdzF6KLavt4PO0gs2a6pQ00=", "unsupported"),
            ("sha1", "length"),
            ("sha1 qvTGHdzF6KLavt4PO0gs2a6pQ00", "Base64"),
            ("sha1 x y", "Base64"),
            ("sha1 \xe9", "Base64"),
            ("\xe9 qvTGHdzF6KLavt4PO0gs2a6pQ00=", "unsupported"),
            ("md5 qvTGHdzF6KLavt4PO0gs2a6pQ00=", "length"),
            ("sha1 qvTGHdzF6KLavt4PO0gs2a6pQ00=,md5 x", "Base64"),
        ],
    )
    def test_faults(self, client: Client, header: str, word: str) -> None:
        # "400 Bad Request if the checksum algorithm is not supported by the server"
        url = client.create(5)
        environ = {"HTTP_UPLOAD_CHECKSUM": header}
        response = client.patch(url, b"hello", 0, environ=environ)
        assert_refused(response, 400, "Upload-Checksum", word)
        assert client.offset(url) == 0
        assert_refused(client.post(5, b"hello", environ=environ), 400, word)
        assert client.stored() == 1

    def test_no_bytes(self, client: Client) -> None:
        url = client.create(5)
        client.append(url, b"", 0, Upload_Checksum=checksum("sha1", b""))
        assert_refused(client.patch(url, b"", 0, Upload_Checksum=checksum("sha1", b"x")), 460)
        assert client.offset(url) == 0

    def test_a_wrong_offset_is_told_first(self, client: Client) -> None:
        url = client.create(5)
        response = client.patch(url, b"x", 1, Upload_Checksum=checksum("sha1", b"y"))
        assert_refused(response, 409)

    def test_a_body_that_breaks_off_is_discarded_whole(self, client: Client) -> None:
        url = client.create(11, b"hello")
        response = client.patch(
            url,
            b"",
            5,
            Upload_Checksum=checksum("sha1", b" world"),
            environ={"CONTENT_LENGTH": "6", "wsgi.input": Breaking(b" wor")},
        )
        assert_refused(response, 503)
        assert client.offset(url) == 5
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    def test_a_first_body_that_breaks_off(self, client: Client) -> None:
        response = client.post(
            5,
            Content_Type=MIME,
            Upload_Checksum=checksum("sha1", b"hello"),
            environ={"CONTENT_LENGTH": "5", "wsgi.input": Breaking(b"hell")},
        )
        assert response.status_code == 201
        assert response.headers["Upload-Offset"] == "0"
        assert client.offset(path_of(response)) == 0

    @pytest.mark.parametrize("chunked", [False, True])
    def test_too_many_bytes_are_discarded_whole(self, client: Client, chunked: bool) -> None:
        url = client.create(5)
        right = checksum("sha1", b"hello!")
        assert_refused(client.patch(url, b"hello!", 0, Upload_Checksum=right, chunked=chunked), 413)
        assert client.offset(url) == 0

    def test_a_large_body(self, client: Client) -> None:
        data = bytes(range(256)) * 20_000
        url = client.create(len(data))
        assert_refused(client.patch(url, data, 0, Upload_Checksum=checksum("md5", b"")), 460)
        assert client.offset(url) == 0
        client.append(url, data, 0, Upload_Checksum=checksum("md5", data))
        assert client.content(url) == data

    def test_a_mismatch_of_the_last_bytes_finishes_nothing(self, client: Client) -> None:
        asked: list[str] = []
        client.tus.on("pre-finish")(lambda request: asked.append(request.info.id))
        url = client.create(5)
        assert_refused(client.patch(url, b"hello", 0, Upload_Checksum=checksum("md5", b"")), 460)
        assert asked == []
        assert_refused(client.get(url), 404)


class TestTrailer:
    # That trailers work is tested with a real server, which alone can receive them.

    @pytest.mark.parametrize("chunked", [False, True])
    def test_one_that_is_announced_must_come(self, client: Client, chunked: bool) -> None:
        url = client.create(11, b"hello")
        response = client.patch(url, b" world", 5, Trailer="upload-checksum", chunked=chunked)
        assert_refused(response, 400, "Upload-Checksum", "missing")
        assert client.offset(url) == 5
        refused = client.post(5, b"hello", Trailer="Upload-Checksum", chunked=chunked)
        assert_refused(refused, 400, "missing")
        assert client.stored() == 1

    def test_a_header_makes_it_needless(self, client: Client) -> None:
        url = client.create(5)
        given = checksum("sha1", b"hello")
        client.append(url, b"hello", 0, Trailer="Upload-Checksum", Upload_Checksum=given)
        assert client.content(url) == b"hello"

    def test_other_trailers_do_not_matter(self, client: Client) -> None:
        url = client.create(5)
        client.append(url, b"hello", 0, Trailer="X-Other", chunked=True)
