"""Applications behind a real server: programs and web services that rule over uploads."""

from __future__ import annotations

import json
import queue
import select
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from e2e.client import BYTES, PATIENCE, TUS, Response, content, path_of, wait_until
from e2e.conftest import Serve, Server

FORMATS = ("default", "tusd-v2")


@dataclass(frozen=True)
class Heard:
    """A hook as the application got it."""

    type: str
    payload: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def upload(self) -> dict[str, Any]:
        """What is told of the upload, in the form of either dialect."""
        if "Event" in self.payload:
            found: dict[str, Any] = self.payload["Event"]["Upload"]
            return {name.lower(): value for name, value in found.items()}
        return dict(self.payload["upload"])


class Application:
    """A web service with hooks.

    :ivar answer: returns status, content type and body for a hook.
    """

    def __init__(self) -> None:
        self.heard: queue.Queue[Heard] = queue.Queue()
        self.answer: Callable[[Heard], tuple[int, str, str]] = lambda heard: (200, "", "")
        application = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                heard = Heard(self.headers["Hook-Name"], json.loads(body), dict(self.headers))
                status, kind, text = application.answer(heard)
                application.heard.put(heard)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hooks"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def says(self, type: str, **answer: Any) -> None:
        """Answer hooks of one type with a JSON object."""
        text = json.dumps(answer)
        self.answer = lambda heard: (200, "application/json", text if heard.type == type else "")

    def next(self, *types: str) -> Heard:
        """Wait for the next hook of these types."""
        while True:
            heard = self.heard.get(timeout=PATIENCE)
            if heard.type in types:
                return heard

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def application() -> Iterator[Application]:
    one = Application()
    yield one
    one.close()


def start(serve: Serve, application: Application, *flags: str, workers: int = 2) -> Server:
    return serve("--hooks-http-urls", application.url, *flags, workers=workers)


def post(server: Server, size: int, data: bytes = b"", **headers: str) -> Response:
    own = {**(BYTES if data else TUS), "Upload-Length": size, **headers}
    return server.client.request("POST", "/files/", own, data)


class TestHttp:
    @pytest.mark.parametrize("format", FORMATS)
    def test_the_order_of_a_life(self, serve: Serve, application: Application, format: str) -> None:
        server = start(serve, application, "--hooks-format", format)
        path = server.client.create(10)
        assert server.client.patch(path, 0, b"hello").status == 204
        assert server.client.patch(path, 5, b"world").status == 204
        assert server.client.request("DELETE", path, TUS).status == 204
        wanted = ["pre-create", "post-create", "post-finish", "pre-terminate", "post-terminate"]
        heard = [application.next(*wanted) for _ in wanted]
        posts = [one for one in heard if one.type.startswith("post")]
        assert [one.type for one in posts] == ["post-create", "post-finish", "post-terminate"]
        assert {one.upload["id"] for one in posts} == {path.rpartition("/")[2]}
        assert len({one.headers["Hook-Id"] for one in posts}) == 3

    @pytest.mark.parametrize("format", FORMATS)
    def test_one_request(self, serve: Serve, application: Application, format: str) -> None:
        server = start(serve, application, "--hooks-format", format)
        assert post(server, 5, b"hello").status == 201
        first = application.next("post-create", "post-finish")
        if format == "tusd-v2":
            assert (first.type, first.upload["offset"]) == ("post-create", 0)
            first = application.next("post-create", "post-finish")
        assert (first.type, first.upload["offset"]) == ("post-finish", 5)

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_refusal(self, serve: Serve, application: Application, format: str) -> None:
        application.answer = lambda heard: (403, "application/json", '{"why": "quota"}')
        server = start(serve, application, "--hooks-format", format)
        with server.client.connect() as connection:
            refused = connection.request("POST", "/files/", {**BYTES, "Upload-Length": 5}, b"hello")
            assert (refused.status, refused.body) == (403, b'{"why": "quota"}')
            assert refused.headers["content-type"] == "application/json"
            # The connection goes on where the answer ended.
            assert connection.request("OPTIONS", "/files/", {}).status == 204
        assert list(server.data_dir.glob("[!.]*")) == []

    def test_answers_that_have_no_body(self, serve: Serve, application: Application) -> None:
        server = start(serve, application, "--hooks", "pre-finish,pre-access,pre-terminate")
        application.says("pre-finish", HTTPResponse={"Body": "done", "Header": {"X-Job": "7"}})
        path = server.client.create(5)
        with server.client.connect() as connection:
            headers = {**BYTES, "Upload-Offset": 0}
            finished = connection.request("PATCH", path, headers, b"hello")
            assert (finished.status, finished.body) == (204, b"")
            assert finished.headers["x-job"] == "7"
            application.answer = lambda heard: (418, "text/plain", "no tea")
            refused = connection.request("HEAD", path, TUS)
            assert (refused.status, refused.body) == (418, b"")
            refused = connection.request("DELETE", path, TUS)
            assert (refused.status, refused.body) == (418, b"no tea")

    def test_headers_that_come_twice(self, serve: Serve, application: Application) -> None:
        flags = ("--hooks-format", "tusd-v2", "--hooks-http-forward-headers", "Cookie")
        server = start(serve, application, *flags)
        twice = {"X-Tag": "a", "x-tag": "b", "Cookie": "c=1", "cookie": "d=2", "X-Once": "a,b"}
        assert post(server, 5, **twice).status == 201
        for type in ("pre-create", "post-create"):
            heard = application.next(type)
            told = heard.payload["Event"]["HTTPRequest"]["Header"]
            assert told["X-Tag"] == ["a", "b"]
            assert told["Cookie"] == ["c=1", "d=2"]
            assert told["X-Once"] == ["a,b"]
            assert heard.headers["Cookie"] == "c=1; d=2"

    def test_one_that_is_not_there(self, serve: Serve, application: Application) -> None:
        server = start(serve, application, "--hooks-http-retries", "0")
        application.close()
        answer = post(server, 5)
        assert answer.status == 503
        assert answer.headers["retry-after"]
        server.wait_for(r"pre-create.* by http failed")


class TestChoices:
    @pytest.mark.parametrize("format", FORMATS)
    def test_an_id_and_a_path(self, serve: Serve, application: Application, format: str) -> None:
        server = start(serve, application, "--hooks-format", format)
        change = {"ID": "seven", "MetaData": {"k": "v"}, "Storage": {"Path": "a/seven.txt"}}
        application.says("pre-create", ChangeFileInfo=change)
        path = path_of(post(server, 5, b"hello"))
        assert path == "/files/seven"
        assert (server.data_dir / "a" / "seven.txt").read_bytes() == b"hello"
        assert server.client.head(path).headers["upload-metadata"] == "k dg=="

    def test_an_id_and_a_path_as_tusds_documents_have_them(
        self, serve: Serve, application: Application
    ) -> None:
        server = start(serve, application, "--hooks-format", "tusd-v2")
        storage = {"Path": "./upload-e7a036dc/presentation.pdf"}
        application.says("pre-create", ChangeFileInfo={"ID": "7:00%@a+b=c", "Storage": storage})
        path = path_of(post(server, 10, b"hello"))
        assert path == "/files/7:00%25@a+b=c"
        assert server.client.patch(path, 5, b"world").status == 204
        assert application.next("post-finish").upload["id"] == "7:00%@a+b=c"
        assert server.client.get(path).body == b"helloworld"
        file = server.data_dir / "upload-e7a036dc" / "presentation.pdf"
        assert file.read_bytes() == b"helloworld"

    @pytest.mark.parametrize("change", [{"ID": "a/b"}, {"Storage": {"Path": "../evil"}}])
    def test_what_no_upload_may_have_is_told_to_the_operator(
        self, serve: Serve, application: Application, change: dict[str, Any]
    ) -> None:
        server = start(serve, application)
        application.says("pre-create", ChangeFileInfo=change)
        answer = post(server, 5)
        assert answer.status == 500
        assert "retry-after" not in answer.headers
        server.wait_for(r"pre-create of .* by http failed: The (id|path) .* cannot be that of")

    @pytest.mark.parametrize(
        "change", [{"ID": "seven"}, {"Storage": {"Path": "a/seven"}}], ids=["id", "path"]
    )
    def test_a_kill_before_the_answer(
        self, serve: Serve, application: Application, change: dict[str, Any]
    ) -> None:
        """The POST that comes again goes on where the first one was cut off."""
        server = start(serve, application)
        application.says("pre-create", ChangeFileInfo=change)
        file = server.data_dir / ("seven" if "ID" in change else "a/seven")
        data = content(1_000_000)
        with server.client.connect() as connection:
            headers = {**BYTES, "Upload-Length": len(data), "Content-Length": len(data)}
            connection.send(connection.head("POST", "/files/", headers) + data[:300_000])
            wait_until(lambda: file.exists() and file.stat().st_size == 300_000, "the bytes")
            server.kill()
        server.start()
        again = post(server, len(data), data)
        assert (again.status, again.offset) == (201, 300_000)
        other = post(server, len(data) + 1)
        assert other.status == 409
        path = path_of(again)
        assert server.client.patch(path, 300_000, data[300_000:]).status == 204
        assert server.client.get(path).body == data
        # The death of its POST has freed it.
        assert application.next("post-create", "post-finish").type == "post-create"
        assert application.next("post-create", "post-finish").type == "post-finish"


def test_a_slow_patch_is_stopped(serve: Serve, application: Application) -> None:
    server = start(serve, application, "--progress-hooks-interval", "50ms")
    path = server.client.create(100_000)
    answer = {"StatusCode": 422, "Body": "enough", "Header": {"X-Why": "virus"}}
    application.says("post-receive", StopUpload=True, HTTPResponse=answer)
    assert application.next("post-create").type == "post-create"
    with server.client.start_patch(path, 0, 100_000, bytes(1000)) as connection:
        # It is slow, and has not sent all when it is told.
        while not select.select([connection.sock], [], [], 0.02)[0]:
            connection.send(bytes(10))
        stopped = connection.read()
    assert (stopped.status, stopped.body) == (422, b"enough")
    assert stopped.headers["x-why"] == "virus"
    assert server.client.head(path).status == 410
    assert not server.file(path).exists()
    assert application.next("post-terminate").upload["id"] == path.rpartition("/")[2]


def test_the_progress_of_a_slow_patch_is_told_at_its_interval(
    serve: Serve, application: Application
) -> None:
    server = start(serve, application, "--progress-hooks-interval", "100ms", workers=1)
    path = server.client.create(10_000_000)
    offsets: list[int] = []
    with server.client.start_patch(path, 0, 10_000_000, bytes(1000)) as connection:
        while len(offsets) < 10:
            connection.send(bytes(1000))
            try:
                heard = application.heard.get(timeout=0.01)
            except queue.Empty:
                continue
            if heard.type == "post-receive":
                offsets.append(heard.upload["offset"])
    assert offsets == sorted(set(offsets))
    # The kernel hands over a quarter of a megabyte at a time, if it is left to it.
    assert offsets[-1] - offsets[0] < 1_000_000


SCRIPT = """#!/bin/sh
echo "$1 $TUS_ID $TUS_OFFSET" >> {log}
case "$1" in
  pre-create) {pre_create} ;;
esac
"""


def test_the_id_of_a_request_reaches_the_application(
    serve: Serve, application: Application
) -> None:
    server = start(serve, application)
    for headers in ({"X-Request-ID": "from-a-proxy"}, {}):
        id = post(server, 5, b"hello", **headers).headers["x-request-id"]
        assert id == headers.get("X-Request-ID", id)
        # What is told later, by whatever worker, still says which request it comes of.
        for heard in (application.next("pre-create"), application.next("post-finish")):
            assert heard.headers["X-Request-ID"] == id


def program(directory: Path, pre_create: str = ":") -> tuple[Path, Path]:
    """Write a hook, and return it and its log."""
    hook, log = directory / "hook.sh", directory / "hook.log"
    hook.write_text(SCRIPT.format(log=log, pre_create=pre_create))
    hook.chmod(0o755)
    return hook, log


class TestFile:
    @pytest.mark.parametrize("format", FORMATS)
    def test_it_is_told(self, serve: Serve, tmp_path: Path, format: str) -> None:
        hook, log = program(tmp_path)
        server = serve("--hooks-file", str(hook), "--hooks-format", format)
        path = server.client.create(5)
        assert server.client.patch(path, 0, b"hello").status == 204
        id = path.rpartition("/")[2]
        wait_until(lambda: f"post-finish {id} 5\n" in log.read_text(), "post-finish")
        types = [line.split()[0] for line in log.read_text().splitlines()]
        assert [type for type in types if type != "post-receive"] == [
            "pre-create",
            "post-create",
            "post-finish",
        ]

    @pytest.mark.parametrize("format", FORMATS)
    def test_it_refuses(self, serve: Serve, tmp_path: Path, format: str) -> None:
        hook, _ = program(tmp_path, "echo 'not today' >&2; exit 1")
        server = serve("--hooks-file", str(hook), "--hooks-format", format)
        answer = post(server, 5)
        assert answer.status == (500 if format == "tusd-v2" else 400)
        assert b"not today" in answer.body

    def test_it_comes_before_the_web_service(
        self, serve: Serve, application: Application, tmp_path: Path
    ) -> None:
        hook, _ = program(tmp_path, "exit 1")
        server = start(serve, application, "--hooks-file", str(hook))
        assert post(server, 5).status == 400
        assert application.heard.empty()
