"""Reports to Sentry: the real client in real workers, and a server that hears them."""

from __future__ import annotations

import gzip
import json
import queue
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e.client import PATIENCE
from e2e.conftest import Serve, Server


class Ingest:
    """The part of Sentry's that takes reports."""

    def __init__(self) -> None:
        #: The events, and the bytes that they came in.
        self.heard: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
        self.is_open = threading.Event()
        self.is_open.set()
        ingest = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                ingest.is_open.wait(PATIENCE)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                ingest.take(body)
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.dsn = f"http://public-key@127.0.0.1:{self._server.server_address[1]}/7"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, envelope: bytes) -> None:
        """Keep the events of an envelope: lines of headers, each followed by its item."""
        _, *lines = envelope.splitlines()
        for head, item in zip(lines[::2], lines[1::2], strict=False):
            if json.loads(head)["type"] == "event":
                self.heard.put((json.loads(item), envelope))

    def next(self) -> tuple[dict[str, Any], bytes]:
        return self.heard.get(timeout=PATIENCE)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def ingest() -> Iterator[Ingest]:
    ingest = Ingest()
    yield ingest
    ingest.close()


def break_upload(server: Server) -> str:
    """Make an upload whose file is none, so that the server fails, and return its path."""
    path = server.client.create(100_000, Upload_Metadata="k c2VjcmV0LW1ldGFkYXRh")
    server.file(path).unlink()
    server.file(path).mkdir()
    return path


def fail(server: Server, path: str) -> None:
    headers = {"X-Request-ID": "request-1", "Authorization": "Bearer secret-token"}
    answer = server.client.patch(path, server.stored(path), b"secret-body", **headers)
    assert answer.status == 500


def test_an_error_is_reported(serve: Serve, ingest: Ingest) -> None:
    server = serve("--sentry-dsn", ingest.dsn)
    server.expected = "IsADirectoryError"
    path = break_upload(server)
    fail(server, path)
    event, envelope = ingest.next()
    (error,) = event["exception"]["values"]
    assert error["type"] == "IsADirectoryError"
    assert any("tuswsgi" in frame["module"] for frame in error["stacktrace"]["frames"])
    assert event["tags"]["request_id"] == "request-1"
    assert event["tags"]["upload_id"] == path.rpartition("/")[2]
    assert event["level"] == "error"
    assert b"secret-" not in envelope
    assert b"c2VjcmV0" not in envelope
    assert "request" not in event


def test_a_worker_that_ends_sends_its_last_reports(serve: Serve, ingest: Ingest) -> None:
    server = serve("--sentry-dsn", ingest.dsn, workers=1)
    server.expected = "IsADirectoryError"
    ingest.is_open.clear()
    # One more than is on its way at a time.
    for path in (break_upload(server), break_upload(server)):
        fail(server, path)
    server.signal(signal.SIGTERM)
    server.wait_for("Worker exiting")
    ingest.is_open.set()
    assert server.wait() == 0
    assert ingest.heard.qsize() == 2


def test_a_share_of_nothing(serve: Serve, ingest: Ingest) -> None:
    server = serve(environ={"RUSTUS_SENTRY_DSN": ingest.dsn, "RUSTUS_SENTRY_SAMPLE_RATE": "0"})
    server.expected = "IsADirectoryError"
    fail(server, break_upload(server))
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert ingest.heard.empty()


def test_sentry_that_cannot_be_reached_is_no_matter(serve: Serve) -> None:
    server = serve("--sentry-dsn", "http://key@127.0.0.1:9/1")
    server.expected = "IsADirectoryError"
    fail(server, break_upload(server))
    assert server.client.create(10)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_what_the_client_did_is_not_reported(serve: Serve, ingest: Ingest) -> None:
    server = serve("--sentry-dsn", ingest.dsn)
    path = server.client.create(1000)
    server.client.start_patch(path, 0, 1000, b"x" * 10).close()
    server.client.patch(path, 999, b"x")
    server.wait_for("ERR_UNEXPECTED_EOF")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert ingest.heard.empty()
