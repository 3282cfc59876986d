"""A tus client on Flask's test client, and the server that it talks to.

Each method sends what a well-behaved client would, and `headers` change or add to that:
``Upload_Offset=3`` is ``Upload-Offset: 3``, and ``None`` leaves a header out.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_to_bytes

import flask
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app
from werkzeug.wrappers import Request

from tuswsgi.app import Tus

MIME = "application/offset+octet-stream"


class Client:
    """A client of the upload collection at `url`."""

    def __init__(self, app: flask.Flask, tus: Tus, url: str = "/files") -> None:
        self.app = app
        self.tus = tus
        self.url = url

    def request(
        self,
        method: str,
        url: str,
        data: bytes = b"",
        *,
        chunked: bool = False,
        environ: dict[str, Any] | None = None,
        **headers: Any,
    ) -> TestResponse:
        """Send a request to a path or an absolute URL."""
        pairs: list[tuple[str, str]] = [
            (name.replace("_", "-"), str(value))
            for name, value in headers.items()
            if value is not None
        ]
        path, _, query = (path_of_url(url) if "://" in url else url).partition("?")
        builder = EnvironBuilder(method=method, data=data, headers=pairs, query_string=query)
        # Neither is anything else made of the path, nor of what the test wants in `environ`.
        values = builder.get_environ() | {
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "RAW_URI": url,
            "REMOTE_ADDR": "127.0.0.1",
        }
        builder.close()
        if chunked:
            values |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
            values.pop("CONTENT_LENGTH", None)
        values |= environ or {}
        content, status, sent = run_wsgi_app(self.app, values, buffered=True)
        return TestResponse(content, status, sent, Request(values))

    def post(self, length: int | None = None, data: bytes = b"", **headers: Any) -> TestResponse:
        """Create an upload; without a length it is left to the headers."""
        given: dict[str, Any] = {"Tus_Resumable": "1.0.0", "Upload_Length": length}
        if data:
            given["Content_Type"] = MIME
        return self.request("POST", headers.pop("url", self.url), data, **(given | headers))

    def create(self, length: int | None = None, data: bytes = b"", **headers: Any) -> str:
        """Create an upload and return its path."""
        response = self.post(length, data, **headers)
        assert response.status_code == 201, response.text
        return path_of(response)

    def patch(self, url: str, data: bytes, offset: int | str, **headers: Any) -> TestResponse:
        given: dict[str, Any] = {
            "Tus_Resumable": "1.0.0",
            "Content_Type": MIME,
            "Upload_Offset": offset,
        }
        return self.request("PATCH", url, data, **(given | headers))

    def append(self, url: str, data: bytes, offset: int, **headers: Any) -> None:
        """Append bytes, which has to work."""
        response = self.patch(url, data, offset, **headers)
        assert response.status_code == 204, response.text
        assert response.headers["Upload-Offset"] == str(offset + len(data))

    def head(self, url: str, **headers: Any) -> TestResponse:
        return self.request("HEAD", url, **({"Tus_Resumable": "1.0.0"} | headers))

    def offset(self, url: str) -> int:
        """Return the offset that HEAD tells."""
        response = self.head(url)
        assert response.status_code == 200
        return int(response.headers["Upload-Offset"])

    def get(self, url: str, **headers: Any) -> TestResponse:
        return self.request("GET", url, **headers)

    def content(self, url: str) -> bytes:
        """Return the bytes of a finished upload."""
        response = self.get(url)
        assert response.status_code == 200, response.text
        return response.data

    def delete(self, url: str, **headers: Any) -> TestResponse:
        return self.request("DELETE", url, **({"Tus_Resumable": "1.0.0"} | headers))

    def options(self, url: str | None = None, **headers: Any) -> TestResponse:
        return self.request("OPTIONS", url or self.url, **headers)

    def part(self, data: bytes, length: int | None = None) -> str:
        """Create a partial upload with `data`, finished unless `length` says otherwise."""
        return self.create(len(data) if length is None else length, data, Upload_Concat="partial")

    def final(self, *parts: str, **headers: Any) -> TestResponse:
        return self.post(Upload_Concat="final;" + " ".join(parts), **headers)

    def stored(self) -> int:
        """Return how many uploads there are, tombstones not counted."""
        self.tus.start()
        return sum(not info.is_gone for info in self.tus.uploads.infos.list(limit=10**6))


class Breaking(io.RawIOBase):
    """A request's body that breaks off."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, n: int = -1) -> bytes:
        if not self._data:
            raise OSError("connection reset by peer")
        block, self._data = self._data[:n], self._data[n:]
        return block


def path_of(response: TestResponse) -> str:
    """Return the path in ``Location``."""
    return path_of_url(response.headers["Location"])


def path_of_url(url: str) -> str:
    return "/" + url.split("/", 3)[3] if "://" in url else url


def metadata(**values: str | bytes) -> str:
    """Return ``Upload-Metadata``."""
    pairs = []
    for key, value in values.items():
        data = value.encode() if isinstance(value, str) else value
        pairs.append(f"{key} {b64encode(data).decode()}")
    return ",".join(pairs)


def assert_refused(response: TestResponse, status: int, *words: str) -> None:
    """Check that an answer is an error as all errors are: one plain sentence and headers."""
    assert response.status_code == status, (response.status, response.text)
    assert response.headers["Tus-Resumable"] == "1.0.0"
    assert "no-store" in response.headers["Cache-Control"]
    if response.request.method != "HEAD":
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        line = response.text
        assert line.endswith("\n")
        assert line.count("\n") == 1
        code, _, sentence = line.strip().partition(": ")
        assert code.startswith("ERR_")
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        for word in words:
            assert word in sentence
        for leak in ("Traceback", "Error(", "Exception", "/tuswsgi/", "<"):
            assert leak not in line


@contextmanager
def closing(tus: Tus) -> Iterator[Tus]:
    """Close the backends of a server in the end."""
    try:
        yield tus
    finally:
        tus.drain()
        # The sweep of its first request may still be on its way.
        tus.uploads.locker.prepare()
        with tus.uploads.locker.lock("tuswsgi-sweep", lambda reason: None):
            tus.uploads.infos.close()
        tus.uploads.locker.close()
        tus.uploads.data.close()
