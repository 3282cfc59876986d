"""Random requests: whatever a client sends, the server answers as it promised.

The second half compares it with a model that is simple enough to be seen to be right.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import string
from base64 import b64encode
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from werkzeug.test import TestResponse

from protocol.client import MIME, Client, closing, path_of
from protocol.conftest import BACKENDS
from tuswsgi.app import create_app
from tuswsgi.config.loading import Config
from tuswsgi.serving.dispatch import Dispatcher

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def server() -> Client:
    """Return a client of the one server of this file; examples would start thousands."""
    flags = BACKENDS["memory"] | {"max_file_size": "1000", "lock_timeout": "1s", "expiration": "1d"}
    app = create_app(Config.load(flags=flags))
    app.wsgi_app = Dispatcher(app)  # type: ignore[method-assign]  # as it is served
    stack = ExitStack()
    atexit.register(stack.close)
    return Client(app, stack.enter_context(closing(app.extensions["tuswsgi"])))


#: Anything that gunicorn lets through in a value: latin-1 without control characters.
anything = st.text(
    st.characters(max_codepoint=255, exclude_categories=["Cc"], include_characters="\t"),
    max_size=60,
)
numbers = st.one_of(
    st.integers(-(2**64), 2**64).map(str),
    st.sampled_from(
        [
            "",
            "0",
            "5",
            "+5",
            " 5",
            "5 ",
            "05",
            "1_0",
            "5,5",
            "\xb2",
            "\xd9\xa1",
            "1e3",
            "0x5",
            str(2**63),
            str(2**63 - 1),
            "9" * 400,
            "NaN",
            "-0",
        ]
    ),
)
base64s = st.binary(max_size=30).map(lambda data: b64encode(data).decode())
keys = st.text(string.ascii_letters + string.punctuation, min_size=1, max_size=8)
metadata = st.lists(st.tuples(keys, base64s).map(" ".join), max_size=4).map(",".join)
checksums = st.tuples(
    st.sampled_from(["sha1", "md5", "crc32", "sha256", "SHA1", "none", ""]), base64s
).map(" ".join)
urls = st.one_of(
    st.sampled_from(
        [
            "/files/unknown",
            "http://localhost/files/x",
            "//evil/files/x",
            "/files/..",
            "/files/%00",
            "http://[::1/files/x",
            "x",
            "/files/",
            "/files/a?b",
            "http://[v1.x]/files/a",
        ]
    ),
    anything,
)

HEADERS: dict[str, st.SearchStrategy[str]] = {
    "HTTP_TUS_RESUMABLE": st.sampled_from(["1.0.0"] * 8 + ["0.2.2", "", "1.0.0,1.0.0"]),
    "HTTP_UPLOAD_OFFSET": numbers | anything,
    "HTTP_UPLOAD_LENGTH": numbers | anything,
    "HTTP_UPLOAD_DEFER_LENGTH": st.sampled_from(["1", "0", "", "1,1", "true", "01"]),
    "HTTP_UPLOAD_METADATA": metadata | anything,
    "HTTP_UPLOAD_CONCAT": st.one_of(
        st.just("partial"),
        st.lists(urls, max_size=4).map(lambda parts: "final;" + " ".join(parts)),
        anything,
    ),
    "HTTP_UPLOAD_CHECKSUM": checksums | anything,
    "HTTP_TRAILER": st.sampled_from(["Upload-Checksum", "x, upload-checksum"]) | anything,
    "CONTENT_TYPE": st.sampled_from([MIME] * 4 + ["", "text/plain", "a/b;c"]) | anything,
    "HTTP_X_HTTP_METHOD_OVERRIDE": st.sampled_from(
        ["", "post", "PATCH", "Head", "OPTIONS", "FOO", "GET"]
    )
    | anything,
    # What is no name for IDNA either is refused by Flask itself, before anybody is asked.
    "HTTP_HOST": st.sampled_from(
        ["localhost", "a:1", "[::1]", "a b", "", "[", "a:b", "a/b", "u@h", "\xe9", "a\\", "<x>"]
    ),
    "HTTP_ORIGIN": anything,
    "HTTP_ACCESS_CONTROL_REQUEST_METHOD": anything,
    "HTTP_FORWARDED": anything,
    "HTTP_X_FORWARDED_HOST": anything,
    "HTTP_RANGE": anything | numbers.map(lambda number: f"bytes={number}-{number}"),
    "HTTP_IF_RANGE": anything,
    "HTTP_IF_NONE_MATCH": anything,
    "HTTP_IF_MODIFIED_SINCE": anything,
    "HTTP_EXPECT": anything,
}

bodies = st.binary(max_size=20)


@st.composite
def distorted(draw: st.DrawFn, **valid: str) -> dict[str, str]:
    """The headers of a request that is right, up to four of them changed or added."""
    headers = {"HTTP_TUS_RESUMABLE": "1.0.0", "CONTENT_TYPE": MIME, **valid}
    for name in draw(st.lists(st.sampled_from(list(HEADERS)), max_size=4, unique=True)):
        headers[name] = draw(HEADERS[name])
    return headers


CONTROLS = {chr(code) for code in range(32)} - {"\t"} | {"\x7f"}


def check(response: TestResponse, method: str) -> None:
    """Check what holds for every answer."""
    event(str(response.status_code))
    assert response.status_code < 500 or response.status_code in (503, 507), response.text
    assert response.headers["Tus-Resumable"] == "1.0.0"
    for name, value in response.headers.items():
        assert not set(value) & CONTROLS, f"{name}: {value!r}"
        value.encode("latin-1")
    if response.status_code >= 400 and method != "HEAD":
        assert response.text.startswith("ERR_")
        assert response.text.count("\n") == 1
        assert "Traceback" not in response.text


@FEW
@given(distorted(HTTP_UPLOAD_LENGTH="20"), bodies, st.booleans())
@example({"HTTP_TUS_RESUMABLE": "1.0.0", "HTTP_UPLOAD_LENGTH": "\xb2"}, b"", False)
@example({"HTTP_TUS_RESUMABLE": "1.0.0", "HTTP_UPLOAD_LENGTH": "9" * 5000}, b"", False)
def test_creation(headers: Mapping[str, str], data: bytes, chunked: bool) -> None:
    client = server()
    before = client.stored()
    response = client.request("POST", "/files", data, chunked=chunked, environ=dict(headers))
    check(response, "POST")
    assert client.stored() == before + (response.status_code == 201)
    if response.status_code == 201:
        id = response.headers["Location"].rpartition("/")[2]
        info = client.tus.uploads.infos.load(id)
        assert info.offset <= len(data)
        if "HTTP_UPLOAD_METADATA" in headers:
            head = client.head(f"/files/{id}")
            raw = headers["HTTP_UPLOAD_METADATA"]
            assert head.headers.get("Upload-Metadata", "") == raw


@FEW
@given(
    distorted(HTTP_UPLOAD_OFFSET="3"),
    bodies,
    st.booleans(),
    st.sampled_from([None, 5, 20]),
    st.just(b"abc") | bodies,
)
@example({"HTTP_TUS_RESUMABLE": "1.0.0", "HTTP_UPLOAD_OFFSET": "0"}, b"hello", False, 5, b"")
def test_appending(
    headers: Mapping[str, str], data: bytes, chunked: bool, length: int | None, kept: bytes
) -> None:
    client = server()
    kept = kept[: 20 if length is None else length]
    url = client.create(length, kept, Upload_Defer_Length=1 if length is None else None)
    response = client.request("PATCH", url, data, chunked=chunked, environ=dict(headers))
    check(response, headers.get("HTTP_X_HTTP_METHOD_OVERRIDE", ""))
    head = client.head(url)
    assert head.status_code == 200
    offset = int(head.headers["Upload-Offset"])
    info = client.tus.uploads.infos.load(url.rpartition("/")[2])
    with_bytes = kept + data
    opened = client.tus.uploads.data.open(info)
    assert opened.read() == with_bytes[:offset]
    if response.status_code == 204 and "Upload-Offset" in response.headers:
        assert int(response.headers["Upload-Offset"]) == offset
    elif response.status_code in range(400, 500) and response.status_code != 413:
        assert offset == len(kept), "a request that is refused stores nothing"
    elif response.status_code == 413 and not chunked:
        assert offset == len(kept)


@FEW
@given(
    distorted(HTTP_RANGE="bytes=1-3"),
    st.sampled_from(["GET", "HEAD", "DELETE", "OPTIONS", "PUT"]),
    st.binary(max_size=8),
)
def test_the_rest(headers: Mapping[str, str], method: str, path: bytes) -> None:
    client = server()
    url = client.create(5, b"hello", Upload_Metadata="filetype dGV4dC9wbGFpbg==")
    response = client.request(method, url, environ=dict(headers))
    check(response, method)
    if response.status_code == 206:
        start, stop = response.headers["Content-Range"].split("/")[0].split()[1].split("-")
        if method != "HEAD":
            assert response.data == b"hello"[int(start) : int(stop) + 1]
    assume(not path.strip(b"/").isalnum())
    environ = {"PATH_INFO": "/files/" + path.decode("latin-1"), "HTTP_TUS_RESUMABLE": "1.0.0"}
    response = client.request(method, "/files", environ=environ)
    check(response, method)
    assert response.status_code in (204, 404, 405)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(["filename", "filetype", "name", "type"]),
        st.one_of(st.text(max_size=30), st.binary(max_size=30)),
        max_size=4,
    )
)
def test_downloads_of_any_name_and_type(values: dict[str, str | bytes]) -> None:
    client = server()
    pairs = []
    for key, value in values.items():
        data = value.encode("utf-8", "replace") if isinstance(value, str) else value
        pairs.append(f"{key} {b64encode(data).decode()}")
    url = client.create(5, b"hello", Upload_Metadata=",".join(pairs))
    response = client.get(url)
    assert response.status_code == 200
    check(response, "GET")
    assert response.headers["Content-Disposition"].isascii()
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@dataclass
class Upload:
    """What the model knows about an upload."""

    length: int | None
    data: bytes = b""
    is_part: bool = False
    parts: list[str] = field(default_factory=list)
    is_gone: bool = False

    @property
    def is_final(self) -> bool:
        return bool(self.parts)

    @property
    def is_done(self) -> bool:
        return self.length == len(self.data)


class Model(RuleBasedStateMachine):
    """A server beside a dictionary that behaves as the server should."""

    known = Bundle("known")
    #: What takes bytes.
    uploads = Bundle("uploads")
    parts = Bundle("parts")
    finals = Bundle("finals")

    @initialize(targets=(known, uploads, parts))
    def start(self) -> str:
        self.client = server()
        self.model: dict[str, Upload] = {}
        return self._create(5, b"hel", is_part=True)

    def _create(self, length: int | None, data: bytes, is_part: bool) -> str:
        data = data if length is None else data[:length]
        url = self.client.create(
            length,
            data,
            Upload_Defer_Length=1 if length is None else None,
            Upload_Concat="partial" if is_part else None,
        )
        assert url not in self.model
        self.model[url] = Upload(length, data, is_part)
        return url

    @rule(targets=(known, uploads), length=st.none() | st.integers(0, 20), data=bodies)
    def create(self, length: int | None, data: bytes) -> str:
        return self._create(length, data, is_part=False)

    @rule(targets=(known, uploads, parts), length=st.none() | st.integers(0, 9), data=bodies)
    def create_part(self, length: int | None, data: bytes) -> str:
        return self._create(length, data, is_part=True)

    @rule(targets=(known, finals), urls=st.lists(parts, min_size=1, max_size=4))
    def create_final(self, urls: list[str]) -> Any:
        response = self.client.final(*urls)
        if any(self.model[url].is_gone for url in urls):
            assert response.status_code == 410
            return multiple()
        assert response.status_code == 201
        url = path_of(response)
        self.model[url] = Upload(None, parts=urls)
        self._settle()
        return url

    @rule(
        url=uploads,
        data=bodies,
        chunked=st.booleans(),
        says=st.sampled_from(["nothing", "length", "checksum", "wrong checksum"]),
    )
    def append(self, url: str, data: bytes, chunked: bool, says: str) -> None:
        upload = self.model[url]
        data = data if upload.length is None else data[: upload.length - len(upload.data)]
        headers: dict[str, str | int] = {}
        if says == "length" and not upload.is_gone:
            headers["Upload-Length"] = upload.length or len(upload.data) + len(data)
        elif says == "checksum":
            headers["Upload-Checksum"] = f"sha1 {sha1(data)}"
        elif says == "wrong checksum":
            headers["Upload-Checksum"] = f"sha1 {sha1(data + b'!')}"
        offset = len(upload.data)
        response = self.client.patch(url, data, offset, chunked=chunked, **headers)
        if upload.is_gone:
            assert response.status_code == 410
        elif says == "wrong checksum" and not upload.is_done:
            assert response.status_code == 460
        else:
            assert response.status_code == 204, response.text
            upload.data += data
            if says == "length":
                upload.length = int(headers["Upload-Length"])
            assert response.headers["Upload-Offset"] == str(len(upload.data))
        self._settle()

    @rule(url=uploads, data=bodies, offset=st.integers(0, 30))
    def append_elsewhere(self, url: str, data: bytes, offset: int) -> None:
        upload = self.model[url]
        offset += offset >= len(upload.data)
        response = self.client.patch(url, data, offset)
        if upload.is_gone:
            assert response.status_code == 410
        else:
            assert response.status_code == 409
            assert response.headers["Upload-Offset"] == str(len(upload.data))

    @rule(url=uploads, data=st.binary(min_size=1, max_size=9))
    def append_too_much(self, url: str, data: bytes) -> None:
        upload = self.model[url]
        if upload.length is None or upload.is_gone:
            return
        data += bytes(upload.length - len(upload.data))
        assert self.client.patch(url, data, len(upload.data)).status_code == 413

    @rule(url=finals, data=bodies)
    def append_to_a_final(self, url: str, data: bytes) -> None:
        status = 410 if self.model[url].is_gone else 403
        assert self.client.patch(url, data, 0).status_code == status

    @rule(url=known)
    def delete(self, url: str) -> None:
        status = 410 if self.model[url].is_gone else 204
        assert self.client.delete(url).status_code == status
        self.model[url].is_gone = True

    @rule(url=known)
    def look(self, url: str) -> None:
        self._compare(url)

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        for url in list(self.model)[-3:]:
            self._compare(url)

    def _settle(self) -> None:
        """Make every final upload whose parts are complete."""
        for upload in self.model.values():
            parts = [self.model[url] for url in upload.parts]
            if not parts or upload.is_gone or upload.length is not None:
                continue
            if all(part.is_done and not part.is_gone for part in parts):
                upload.data = b"".join(part.data for part in parts)
                upload.length = len(upload.data)

    def _compare(self, url: str) -> None:
        upload, head, got = self.model[url], self.client.head(url), self.client.get(url)
        is_lost = (
            upload.is_final
            and upload.length is None
            and any(self.model[part].is_gone for part in upload.parts)
        )
        if upload.is_gone or is_lost:
            assert head.status_code == 410
            assert got.status_code == (410 if upload.is_gone else 404)
            return
        assert head.status_code == 200
        if upload.is_final and upload.length is None:
            assert "Upload-Offset" not in head.headers
            return
        assert head.headers["Upload-Offset"] == str(len(upload.data))
        if upload.length is None:
            assert head.headers["Upload-Defer-Length"] == "1"
        else:
            assert head.headers["Upload-Length"] == str(upload.length)
        assert got.status_code == (200 if upload.is_done else 404)
        if upload.is_done:
            assert got.data == upload.data


def sha1(data: bytes) -> str:
    return b64encode(hashlib.sha1(data).digest()).decode()


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSequences = Model.TestCase
