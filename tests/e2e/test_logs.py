"""The log of a real server: what is told of requests, in text and in JSON."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.client import BYTES, TUS, chunk, patch_headers, path_of, sha1, wait_until
from e2e.conftest import Serve, Server, running

ROOT = Path(__file__).parent.parent.parent

#: The id of a request at the end of a line.
ID = r"\[[0-9a-f]{16}\]"


def id_of(path: str) -> str:
    return path.rpartition("/")[2]


def lines_of(server: Server, path: str) -> list[str]:
    return [line.rstrip() for line in server.log.splitlines() if id_of(path) in line]


def objects(server: Server) -> list[dict[str, Any]]:
    """Return the lines of a log, each of which must be a JSON object."""
    return [json.loads(line) for line in server.log.splitlines()]


def objects_of(server: Server, path: str, *methods: str) -> list[dict[str, Any]]:
    return [
        line
        for line in objects(server)
        if line.get("upload_id") == id_of(path) and line.get("method") in methods
    ]


def wait_for_objects(
    server: Server, path: str, method: str, count: int = 1
) -> list[dict[str, Any]]:
    wait_until(lambda: len(objects_of(server, path, method)) >= count, f"{count} lines of {method}")
    return objects_of(server, path, method)


def broken_upload(server: Server) -> str:
    """Return the path of an upload whose file is none."""
    path = server.client.create(100_000)
    server.file(path).unlink()
    server.file(path).mkdir()
    return path


def test_requests_with_bytes_and_ends_of_uploads_are_told(serve: Serve) -> None:
    server = serve()
    path = server.client.create(2000)
    server.client.patch(path, 0, bytes(500))
    server.client.patch(path, 500, bytes(1500))
    server.client.request("DELETE", path, TUS)
    server.wait_for("DELETE")
    create, first, second, delete = lines_of(server, path)
    place = rf"in \d+\.\d\d s from 127\.0\.0\.1 {ID}$"
    assert re.search(rf"\[INFO\] POST {id_of(path)}: 201 {place}", create)
    assert re.search(rf"\[INFO\] PATCH {id_of(path)}: 204, 500 bytes at offset 0 {place}", first)
    assert re.search(rf"PATCH {id_of(path)}: 204, 1500 bytes at offset 500 {place}", second)
    assert re.search(rf"\[INFO\] DELETE {id_of(path)}: 204 {place}", delete)


def test_questions_are_told_at_debug_only(serve: Serve, tmp_path: Path) -> None:
    quiet, chatty = serve(), serve("--log-level", "debug", "--data-dir", str(tmp_path / "other"))
    for server in (quiet, chatty):
        path = server.client.create(10)
        server.client.head(path)
        server.client.request("OPTIONS", path, {})
        server.client.head("/files/nothing")
        server.client.request("DELETE", path, TUS)
        server.wait_for("DELETE")
    assert not re.search("HEAD|OPTIONS|GET", quiet.log)
    for told in ("HEAD .*: 200 in", "OPTIONS .*: 204 in", "HEAD nothing: 404 ERR_UPLOAD_NOT_FOUND"):
        assert re.search(rf"\[DEBUG\] {told}", chatty.log)


def test_queries_are_no_business_of_the_access_log(serve: Serve) -> None:
    """They may hold tokens."""
    server = serve("--access-log", "--log-level", "debug")
    server.client.request("OPTIONS", "/files/?token=secret", {})
    server.client.request("GET", "/elsewhere?token=secret", {})
    server.wait_for(r'"OPTIONS /files/ HTTP/1.1" 204')
    server.wait_for(r'"GET /elsewhere HTTP/1.1" 404')
    assert "secret" not in server.log


def test_the_access_log(serve: Serve) -> None:
    server = serve("--access-log")
    response = server.client.request("OPTIONS", "/files/", {"User-Agent": "a test"})
    id = response.headers["x-request-id"]
    server.wait_for(rf'^127\.0\.0\.1 - - \[.*\] "OPTIONS /files/ HTTP/1\.1" 204 .* \d+ {id}$')


def test_why_bodies_break_off(serve: Serve) -> None:
    server = serve("--network-timeout", "1s", "--max-body-size", "5000")
    client = server.client

    def ended(path: str, code: str) -> str:
        return server.wait_for(rf"\[INFO\] PATCH {id_of(path)}: {code}.*")[0]

    gone = client.create(1000)
    client.start_patch(gone, 0, 1000, b"x" * 100).close()
    assert "503 ERR_UNEXPECTED_EOF, 100 bytes at offset 0" in ended(gone, "503")
    silent = client.create(1000)
    with client.start_patch(silent, 0, 1000, b"x" * 70) as connection:
        assert connection.read().status == 503
    assert "503 ERR_READ_TIMEOUT, 70 bytes" in ended(silent, "503")
    mistaken = client.create(1000)
    client.patch(mistaken, 0, bytes(10), Upload_Checksum=sha1(b"other"))
    assert "460 ERR_CHECKSUM_MISMATCH, 10 bytes" in ended(mistaken, "460")
    client.patch(mistaken, 5, bytes(10))
    assert "409 ERR_MISMATCHED_OFFSET, 0 bytes at offset 5" in ended(mistaken, "409")
    large = client.create(10_000)
    client.patch(large, 0, bytes(6000))
    assert "413 ERR_MAX_BODY_SIZE_EXCEEDED" in ended(large, "413")


def test_takeover_and_stop(serve: Serve) -> None:
    server = serve()
    path = server.client.create(1000)
    with server.client.start_patch(path, 0, 1000, b"x" * 100) as connection:
        wait_until(lambda: server.stored(path) == 100, "bytes")
        server.client.head(path)
        assert connection.read().status == 423
    server.wait_for(rf"\[INFO\] PATCH {id_of(path)}: 423 ERR_UPLOAD_INTERRUPTED, 100 bytes")
    with server.client.start_patch(path, 100, 900, b"x" * 50) as connection:
        wait_until(lambda: server.stored(path) == 150, "more bytes")
        server.signal(signal.SIGTERM)
        assert connection.read().status == 503
    server.wait_for(rf"\[INFO\] PATCH {id_of(path)}: 503 ERR_SERVER_SHUTDOWN, 50 bytes")


def test_every_line_is_an_object(serve: Serve) -> None:
    server = serve("--log-format", "json", "--access-log", "--log-level", "debug")
    path = server.client.create(1000)
    server.client.patch(path, 0, bytes(1000), User_Agent="a test")
    server.signal(signal.SIGHUP)
    server.wait_for("Hang up")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    wait_until(lambda: "Shutting down" in server.log, "the master's last word")
    loggers = {line["logger"] for line in objects(server)}
    assert {"gunicorn.error", "gunicorn.access", "tuswsgi.web.request_log"} <= loggers
    for line in objects(server):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("DEBUG", "INFO", "WARNING")
        assert isinstance(line["pid"], int)
    ours, access = objects_of(server, path, "PATCH")
    assert ours["request_id"] == access["request_id"]
    assert (ours["status"], ours["bytes"], ours["offset"]) == (204, 1000, 0)
    assert (access["status"], access["path"], access["user_agent"]) == (204, path, "a test")
    assert ours["client"] == access["client"] == "127.0.0.1"
    assert 0 < ours["duration"] <= access["duration"]


def test_a_reload_changes_the_format(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "tuswsgi.ini"
    file.write_text("[tuswsgi]\nlog_format = text\n")
    server = serve("-c", str(file))
    old = set(server.workers())
    file.write_text("[tuswsgi]\nlog_format = json\n")
    server.signal(signal.SIGHUP)
    wait_until(lambda: not old & set(server.workers()), "the old workers' end")
    start = server.log_length
    server.client.create(10)
    server.wait_for(r'^\{.*"message": "POST', start)


def test_exceptions_are_fields(serve: Serve) -> None:
    server = serve("--log-format", "json")
    server.expected = "IsADirectoryError"
    path = broken_upload(server)
    assert server.client.patch(path, server.stored(path), bytes(10)).status == 500
    (line,) = wait_for_objects(server, path, "PATCH")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["level"] in ("WARNING", "ERROR")


def test_the_id_of_a_request_is_taken_over_and_answered(serve: Serve) -> None:
    server = serve("--log-format", "json")
    path = server.client.create(1000)
    response = server.client.patch(path, 0, bytes(10), X_Request_ID="from-a-proxy.1")
    assert response.headers["x-request-id"] == "from-a-proxy.1"
    # Also where nothing is logged.
    head = server.client.request("HEAD", path, {**TUS, "X-Request-ID": "2"})
    assert head.headers["x-request-id"] == "2"
    made = server.client.patch(path, 10, bytes(10)).headers["x-request-id"]
    first, second = wait_for_objects(server, path, "PATCH", 2)
    assert (first["request_id"], second["request_id"]) == ("from-a-proxy.1", made)
    assert "x-request-id" not in server.client.head(path).headers


@pytest.mark.parametrize("id", ["with spaces", "x" * 129, "\x1b[31m", "café", ""])
def test_an_id_that_is_not_fit_for_a_log_is_replaced(server: Server, id: str) -> None:
    headers = {**TUS, "Upload-Length": 1, "X-Request-ID": id}
    response = server.client.request("POST", "/files/", headers)
    if response.status == 201:  # gunicorn refuses control characters itself
        assert re.fullmatch("[0-9a-f]{16}", response.headers["x-request-id"])
    assert id == "" or f"[{id}]" not in server.log


def test_the_requests_of_a_connection_have_ids_of_their_own(serve: Serve) -> None:
    server = serve("--log-format", "json", "--log-level", "debug")
    path = server.client.create(1000)
    with server.client.connect() as connection:
        # One after the other: plain, none of its own, and one for gunicorn's parser.
        connection.request("PATCH", path, {**patch_headers(0), "X-Request-ID": "one"}, bytes(10))
        connection.request("PATCH", path, patch_headers(10), bytes(10))
        chunked = {**patch_headers(20), "Transfer-Encoding": "chunked", "X-Request-ID": "three"}
        connection.send_head("PATCH", path, chunked)
        connection.send(chunk(bytes(10)) + chunk(b""))
        assert connection.read().status == 204
    one, two, three = wait_for_objects(server, path, "PATCH", 3)
    assert (one["request_id"], three["request_id"]) == ("one", "three")
    assert re.fullmatch("[0-9a-f]{16}", two["request_id"])
    # What is said of the connection itself is said of no request.
    wait_until(
        lambda: any(
            "A connection ends" in line["message"] and "request_id" not in line
            for line in objects(server)
        ),
        "the end of the connection",
    )


@pytest.mark.parametrize("worker", ["gevent", "gthread", "sync"])
def test_other_workers_of_gunicorn(tmp_path: Path, worker: str) -> None:
    environ = {
        "TUSWSGI_HOST": "127.0.0.1",
        "TUSWSGI_PORT": "0",
        "TUSWSGI_WORKERS": "1",
        "TUSWSGI_DATA_DIR": str(tmp_path / "data"),
        "TUSWSGI_LOG_FORMAT": "json",
        "TUSWSGI_ACCESS_LOG": "true",
        "PYTHONPATH": str(ROOT),
    }
    conf = str(ROOT / "conf" / "gunicorn.conf.py")
    command = [
        *(sys.executable, "-m", "gunicorn", "-c", conf, "-k", worker),
        *("--chdir", str(ROOT), "wsgi:application"),
    ]
    with running(Server(command, tmp_path / "data", environ)) as server:
        path = server.client.create(1000)
        for offset, id in ((0, "one"), (10, "two")):
            server.client.patch(path, offset, bytes(10), X_Request_ID=id)
        lines = wait_for_objects(server, path, "PATCH", 4)
    assert [line["request_id"] for line in lines] == ["one", "one", "two", "two"]


def test_secrets_and_metadata_are_not_logged(serve: Serve) -> None:
    server = serve("--log-format", "json", "--log-level", "debug")
    headers = {
        **BYTES,
        "Upload-Length": 10,
        "Upload-Metadata": "name c2VjcmV0LW1ldGFkYXRh",
        "Authorization": "Bearer secret-token",
        "Cookie": "session=secret-cookie",
    }
    response = server.client.request("POST", "/files/?token=secret-query", headers, b"x")
    path = path_of(response)
    wait_for_objects(server, path, "POST")
    assert not re.search("secret-|c2VjcmV0LW1ldGFkYXRh", server.log)


def test_a_path_cannot_forge_a_line(serve: Serve) -> None:
    server = serve("--log-level", "debug")
    for evil in ("x%0Aforged", "x%1B[31m", "x%0D%0Aforged", "%E2%80%A8forged"):
        server.client.patch(f"/files/{evil}", 0, b"x")
    server.wait_for("E2%80%A8")
    assert not any(line.startswith("forged") for line in server.log.splitlines())
    assert "\x1b" not in server.log


def test_the_client_behind_a_proxy(serve: Serve) -> None:
    server = serve("--behind-proxy", "--access-log")
    server.client.patch(server.client.create(10), 0, b"x", X_Forwarded_For="203.0.113.9")
    server.wait_for(r"PATCH .* from 203\.0\.113\.9 ")
    server.wait_for(r'^203\.0\.113\.9 .* "PATCH ')
