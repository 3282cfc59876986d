"""Hooks reach web applications, whose answers count, and which cannot keep anybody waiting."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError, HookBroken, HookFailed, HookRefusal
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.http import HttpHook
from tuswsgi.hooks.payloads import FormatName, payload_format
from tuswsgi.hooks.retries import PermanentFailure

HEADERS = {"authorization": "Bearer jwt", "cookie": "a=b", "host": "example.org", "x-long": "x"}

REQUEST = RequestInfo("POST", "/files/", "192.0.2.1", 4711, HEADERS)


def hook_of(type: HookType = HookType.PRE_CREATE) -> HookRequest:
    return HookRequest(type, FileInfo(id="one", size=5), REQUEST, id="the-hook", sequence=7)


def transport(*urls: str, format: FormatName = FormatName.V2, **options: Any) -> HttpHook:
    options = {"timeout": 20.0, "backoff": 0.01} | options
    return HttpHook(format=payload_format(format), urls=urls, **options)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self)
        self.server.behave(self)

    def answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Receiver(ThreadingHTTPServer):
    """A web application on a port of its own.

    :ivar behave: answers a request.
    """

    request_queue_size = 128

    def __init__(self, behave: Callable[[Handler], None], port: int = 0) -> None:
        self.behave = behave
        self.requests: list[Handler] = []
        self.connections = 0
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/hooks"

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, *args: Any) -> None:
        pass  # we leave in the middle of some answers


@contextmanager
def receiving(behave: Callable[[Handler], None] = Handler.answer, port: int = 0) -> Iterator[Any]:
    receiver = Receiver(behave, port)
    receiver.daemon_threads = True
    thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.shutdown()
        thread.join()
        receiver.server_close()


def answering(*args: Any, **kwargs: Any) -> Any:
    """A receiver that always gives the same answer."""
    return receiving(lambda handler: handler.answer(*args, **kwargs))


@contextmanager
def speaking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that breaks the rules: yields its URL, and runs `talk` with each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, suppress(OSError):
                sock.recv(65536)
                talk(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_hook_is_a_post_of_json_that_says_which_hook_it_is() -> None:
    with receiving() as receiver:
        hook = transport(receiver.url)
        assert hook.send(hook_of()) is None
        hook.close()
    (request,) = receiver.requests
    assert request.path == "/hooks"
    assert json.loads(request.body)["upload"]["id"] == "one"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Hook-Name"] == "pre-create"
    assert request.headers["Hook-Id"] == request.headers["Idempotency-Key"] == "the-hook"
    assert request.headers["Hook-Sequence"] == "7"
    assert "Webhook-Signature" not in request.headers
    assert "Authorization" not in request.headers


def test_headers_of_the_client_are_sent_along_but_never_instead_of_ours() -> None:
    with receiving() as receiver:
        names = ("Authorization", "Host", "Hook-Name", "X-Missing")
        hook = transport(receiver.url, proxy_headers=names)
        hook.send(hook_of())
        hook.close()
    (request,) = receiver.requests
    assert request.headers["Authorization"] == "Bearer jwt"
    assert request.headers["Host"] == f"127.0.0.1:{receiver.server_port}"
    assert request.headers["Hook-Name"] == "pre-create"
    assert "Cookie" not in request.headers
    assert "X-Missing" not in request.headers


NBSP = "\xa0Bearer jwt"


@pytest.mark.parametrize(
    "value", [NBSP, "\x85x", " x", "\tx", "a\x00b", "a\x1b[2J", "a\r\nEvil: 1", "\u20ac", "\udc80"]
)
@pytest.mark.parametrize("type", [HookType.PRE_CREATE, HookType.POST_FINISH])
def test_a_header_that_cannot_be_sent_stops_no_hook(
    type: HookType, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"authorization": value, "cookie": "a=\xfc", "x-request-id": value, "x-bad": value}
    told = replace(hook_of(type), request=replace(REQUEST, headers=headers))
    with receiving() as receiver:
        hook = transport(receiver.url, receiver.url, proxy_headers=("Authorization", "Cookie"))
        hook.send(told)
        hook.close()
    assert len(receiver.requests) == 2
    for request in receiver.requests:
        assert "Authorization" not in request.headers
        assert "X-Request-ID" not in request.headers
        assert request.headers["Cookie"] == "a=\xfc"
    # Once, and by its name only.
    lines = [line for line in caplog.messages if "left out" in line]
    assert lines == [f"{type} of one: headers that cannot be sent are left out: Authorization"]


def test_a_header_of_64_kib_is_sent_along() -> None:
    headers = {"authorization": "x" * 65_000, "cookie": ""}
    told = replace(hook_of(), request=replace(REQUEST, headers=headers))
    with receiving() as receiver:
        hook = transport(receiver.url, proxy_headers=("authorization", "Cookie"))
        hook.send(told)
        hook.close()
    (request,) = receiver.requests
    assert len(request.headers["Authorization"]) == 65_000
    assert request.headers["Cookie"] == ""


def test_a_receiver_can_check_the_signature() -> None:
    with receiving() as receiver:
        hook = transport(receiver.url, secret="s3cret")
        hook.send(hook_of())
        hook.close()
    (request,) = receiver.requests
    sent = dict(part.split("=", 1) for part in request.headers["Webhook-Signature"].split(","))
    signed = sent["t"].encode() + b"." + request.body
    assert sent["v1"] == hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert abs(time.time() - int(sent["t"])) < 60
    assert "s3cret" not in repr(hook)


def test_connections_are_used_again_and_cookies_are_not() -> None:
    with answering(200, b"thanks", Set_Cookie="who=one; Path=/") as receiver:
        hook = transport(receiver.url)
        for type in [*HookType, *HookType]:
            hook.send(hook_of(type))
        hook.close()
    assert len(receiver.requests) == 2 * len(HookType)
    assert receiver.connections == 1
    assert not any("Cookie" in request.headers for request in receiver.requests)


def test_a_refusal_reaches_the_client_as_the_application_wrote_it() -> None:
    body = '{"detail": "nö"}'
    with answering(418, body.encode(), Content_Type="application/json") as receiver:
        hook = transport(receiver.url)
        with pytest.raises(HookRefusal) as refusal:
            hook.send(hook_of())
        hook.close()
    assert len(receiver.requests) == 1
    assert (refusal.value.status, refusal.value.body) == (418, body)
    assert refusal.value.headers == {"Content-Type": "application/json"}


def test_a_refusal_in_another_charset_is_sent_on_in_ours() -> None:
    type = "text/html; charset=iso-8859-1"
    with answering(403, "nö".encode("latin-1"), Content_Type=type) as receiver:
        hook = transport(receiver.url)
        with pytest.raises(HookRefusal) as refusal:
            hook.send(hook_of())
        hook.close()
    assert refusal.value.body == "nö"
    assert "utf-8" in refusal.value.headers["Content-Type"]


def test_the_text_of_a_refusal_is_bounded() -> None:
    with answering(400, b"x" * 100_000) as receiver:
        hook = transport(receiver.url, max_answer=1000)
        with pytest.raises(HookRefusal) as refusal:
            hook.send(hook_of())
        hook.close()
    assert refusal.value.body == "x" * 1000


@pytest.mark.parametrize("body", [b"", b"null", b"ok", b"[]", b'{"foreign": 1}', b"\xff\xfe"])
def test_what_is_no_answer_accepts(body: bytes) -> None:
    with answering(201, body) as receiver:
        hook = transport(receiver.url)
        assert hook.send(hook_of()) is None
        hook.close()


def test_an_application_can_answer_in_tusds_form() -> None:
    said = {"ChangeFileInfo": {"ID": "two"}, "HTTPResponse": {"StatusCode": 202, "Body": "hm"}}
    with answering(200, json.dumps(said).encode()) as receiver:
        hook = transport(receiver.url)
        answer = hook.send(hook_of())
        hook.close()
    assert answer is not None
    assert answer.change is not None
    assert (answer.change.id, answer.status, answer.body) == ("two", 202, "hm")


@pytest.mark.parametrize("body", [b'{"RejectUpload": "yes"}', b"x" * 2000])
def test_nonsense_refuses_a_request_and_is_no_reason_to_tell_a_fact_again(body: bytes) -> None:
    with answering(200, body) as receiver:
        hook = transport(receiver.url, max_answer=1000)
        with pytest.raises(HookFailed):
            hook.send(hook_of())
        assert hook.send(hook_of(HookType.POST_FINISH)) is None
        hook.close()
    assert len(receiver.requests) == 2


@pytest.mark.parametrize("type", [HookType.PRE_CREATE, HookType.POST_FINISH])
def test_a_redirect_is_a_failure(type: HookType) -> None:
    with receiving() as other, answering(307, Location=other.url) as receiver:
        hook = transport(receiver.url)
        with pytest.raises(HookFailed, match="307"):
            hook.send(hook_of(type))
        hook.close()
    assert len(receiver.requests) == 1
    assert not other.requests


def test_a_blocking_hook_is_repeated_until_the_application_is_well_again() -> None:
    statuses = [500, 503, 200]
    with receiving(lambda handler: handler.answer(statuses.pop(0))) as receiver:
        hook = transport(receiver.url)
        assert hook.send(hook_of()) is None
        hook.close()
    assert {request.headers["Hook-Id"] for request in receiver.requests} == {"the-hook"}
    assert not statuses


@pytest.mark.parametrize("format", [FormatName.DEFAULT, FormatName.V2, FormatName.TUSD])
def test_a_5xx_that_stays_reaches_the_client_as_the_application_wrote_it(
    format: FormatName,
) -> None:
    with answering(503, b"closed for today", Content_Type="text/x-note") as receiver:
        hook = transport(receiver.url, format=format, retries=2)
        with pytest.raises(HookRefusal) as refusal:
            hook.send(hook_of())
        hook.close()
    assert len(receiver.requests) == 3
    assert (refusal.value.status, refusal.value.body) == (503, "closed for today")
    assert refusal.value.headers == {"Content-Type": "text/x-note"}


def test_a_5xx_that_stays_is_a_500_as_from_tusd() -> None:
    with answering(503, b"closed for today") as receiver:
        hook = transport(receiver.url, format=FormatName.TUSD_V2, retries=2)
        with pytest.raises(HookBroken, match="answered 503") as failure:
            hook.send(hook_of())
        hook.close()
    assert len(receiver.requests) == 3
    assert failure.value.status == 500


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"ok", b"[]", b'"{}"', b"0", b"\xff"])
def test_what_is_no_answer_refuses_as_in_tusd(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(200, body) as receiver:
        hook = transport(receiver.url, format=FormatName.TUSD_V2)
        with pytest.raises(HookBroken, match=r"It is not (JSON|a JSON object)") as failure:
            hook.send(hook_of())
        # It was told of what has happened already.
        assert hook.send(hook_of(HookType.POST_FINISH)) is None
        hook.close()
    assert failure.value.status == 500
    assert "It is not" in caplog.text


@pytest.mark.parametrize("body", [b"", b" \n", b"null", b"{}", b'{"foreign": 1}'])
def test_what_says_nothing_accepts_as_in_tusd(body: bytes) -> None:
    with answering(200, body) as receiver:
        hook = transport(receiver.url, format=FormatName.TUSD_V2)
        assert hook.send(hook_of()) is None
        hook.close()


def test_retries_are_bounded_and_only_for_hooks_that_somebody_waits_for() -> None:
    with answering(500) as receiver:
        hook = transport(receiver.url, retries=2)
        with pytest.raises(HookRefusal):
            hook.send(hook_of())
        assert len(receiver.requests) == 3
        with pytest.raises(HookFailed, match="500"):
            hook.send(hook_of(HookType.POST_FINISH))
        assert len(receiver.requests) == 4
        hook.close()


@pytest.mark.parametrize(
    ("status", "lasts"),
    [(400, True), (403, True), (404, True), (408, False), (425, False), (429, False), (503, False)],
)
def test_a_post_hook_that_is_refused_has_not_arrived(status: int, lasts: bool) -> None:
    with answering(status) as receiver:
        hook = transport(receiver.url)
        with pytest.raises(HookFailed, match=str(status)) as failure:
            hook.send(hook_of(HookType.POST_FINISH))
        hook.close()
    assert isinstance(failure.value, PermanentFailure) is lasts


def test_a_post_hook_is_refused_for_good_if_nobody_may_have_it_later() -> None:
    with answering(404) as wrong, answering(503) as down:
        hook = transport(wrong.url, down.url)
        with pytest.raises(HookFailed, match="503"):
            hook.send(hook_of(HookType.POST_FINISH))
        hook.close()


def test_an_application_that_is_down_is_met_again_when_it_is_up() -> None:
    with receiving() as receiver:
        hook = transport(receiver.url, retries=0)
        hook.send(hook_of())
    # What was kept alive is dead now, and nobody listens.
    for request in receiver.requests:
        with suppress(OSError):
            request.connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(HookFailed, match=r"refused|reset|aborted|closed"):
        hook.send(hook_of())
    with receiving(port=receiver.server_port) as again:
        assert hook.send(hook_of()) is None
        assert len(again.requests) == 1
    hook.close()


def test_a_failure_names_the_application_but_not_what_is_secret_of_its_url(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "tuswsgi")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hook = transport(f"http://user:pass@127.0.0.1:{port}/in?token=t0ken", retries=1)
    with pytest.raises(HookFailed) as failure:
        hook.send(hook_of())
    hook.close()
    told = f"{failure.value} {caplog.text}"
    assert f"http://127.0.0.1:{port}/in" in told
    assert "refused" in told
    assert "t0ken" not in told
    assert "pass" not in told


def test_a_connection_that_is_reset_is_a_failure() -> None:
    def reset(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with speaking(reset) as url:
        hook = transport(url, retries=1)
        with pytest.raises(HookFailed, match=r"reset|aborted"):
            hook.send(hook_of())
        hook.close()


def _silence(sock: socket.socket) -> None:
    sock.recv(1)  # ends when the other side gives up


def _drip(sock: socket.socket, start: bytes, drop: bytes) -> None:
    sock.sendall(start)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        sock.sendall(drop)
        time.sleep(0.05)


@pytest.mark.parametrize(
    "talk",
    [
        pytest.param(_silence, id="silence"),
        pytest.param(lambda sock: _drip(sock, b"HTTP/1.1 200 O", b"K"), id="status"),
        pytest.param(lambda sock: _drip(sock, b"HTTP/1.1 200 OK\r\nA: b", b"c"), id="header"),
        pytest.param(
            lambda sock: _drip(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", b"x"),
            id="body",
        ),
        pytest.param(
            lambda sock: _drip(
                sock, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"
            ),
            id="chunks",
        ),
        pytest.param(lambda sock: _drip(sock, b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="100"),
    ],
)
def test_the_timeout_is_for_all_of_an_answer(talk: Callable[[socket.socket], None]) -> None:
    with speaking(talk) as url:
        hook = transport(url, timeout=0.3, retries=0)
        begin = time.monotonic()
        with pytest.raises(HookFailed, match="did not answer"):
            hook.send(hook_of())
        assert time.monotonic() - begin < 30
        hook.close()


def test_a_receiver_that_hangs_costs_no_more_than_the_request_may_wait() -> None:
    with speaking(_silence) as url:
        hook = transport(url, url, timeout=1000.0, retries=1000)
        began = time.monotonic()
        with pytest.raises(HookFailed, match="did not answer"):
            hook.send(replace(hook_of(), deadline=began + 0.3))
        assert 0.3 <= time.monotonic() - began < 500
        hook.close()


def test_what_is_repeated_ends_when_the_request_may_wait_no_longer() -> None:
    with answering(500, b"never") as receiver:
        hook = transport(receiver.url, retries=100_000)
        began = time.monotonic()
        with pytest.raises((HookRefusal, HookFailed)):
            hook.send(replace(hook_of(), deadline=began + 0.3))
        hook.close()
    assert 1 < len(receiver.requests) < 100_000


def test_an_answer_without_end_is_not_read_to_it() -> None:
    def flood(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        while True:
            sock.sendall(b"x" * 65536)

    with speaking(flood) as url:
        hook = transport(url, max_answer=5000)
        with pytest.raises(HookRefusal) as refusal:
            hook.send(hook_of())
        hook.close()
    assert refusal.value.body == "x" * 5000


def test_all_urls_are_called_and_the_first_refusal_ends_the_row() -> None:
    with receiving() as first, answering(403) as second, receiving() as third:
        hook = transport(first.url, second.url, third.url)
        with pytest.raises(HookRefusal):
            hook.send(hook_of())
        assert [len(one.requests) for one in (first, second, third)] == [1, 1, 0]
        hook.close()


def test_a_url_sees_what_those_before_it_have_changed() -> None:
    with answering(200, b'{"ChangeFileInfo": {"ID": "two"}}') as first, receiving() as second:
        hook = transport(first.url, second.url)
        answer = hook.send(hook_of())
        hook.close()
    assert json.loads(second.requests[0].body)["upload"]["id"] == "two"
    assert answer is not None
    assert answer.change is not None
    assert answer.change.id == "two"


def test_a_url_that_is_down_keeps_no_other_from_hearing_of_a_fact() -> None:
    with answering(500) as first, receiving() as second:
        hook = transport(first.url, second.url)
        with pytest.raises(HookFailed):
            hook.send(hook_of(HookType.POST_FINISH))
        hook.close()
    assert len(second.requests) == 1


def test_the_environment_says_which_proxy_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        hook = transport("http://hooks.example/in")
        hook.send(hook_of())
        hook.close()
    assert [request.path for request in proxy.requests] == ["http://hooks.example/in"]


@pytest.mark.parametrize("url", ["localhost:8000/hooks", "ftp://a/b", "http://", "http://a:b/"])
def test_a_url_that_cannot_be_called_is_told_at_the_start(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--hooks-http-urls.*absolute URL"):
        Config.load(environ={}, flags={"hooks_http_urls": url})


def test_hooks_wait_beside_each_other_under_gevent() -> None:
    at_once = 20
    all_here = threading.Barrier(at_once)

    def behave(handler: Handler) -> None:
        # Nobody is answered before all have asked.
        all_here.wait(60)
        handler.answer()

    script = """
        from gevent import monkey
        monkey.patch_all()
        import sys, gevent
        from tuswsgi.core.errors import HookFailed
        from tuswsgi.hooks.base import HookRequest, HookType, RequestInfo
        from tuswsgi.hooks.http import HttpHook
        from tuswsgi.hooks.payloads import FormatName, payload_format
        from tuswsgi.core.info import FileInfo

        hook = HttpHook(payload_format(FormatName.V2), urls=(sys.argv[1],), timeout=60, retries=0)
        sent = HookRequest(HookType.PRE_CREATE, FileInfo(id="one", size=5), RequestInfo())
        for job in gevent.joinall([gevent.spawn(hook.send, sent) for _ in range(20)]):
            job.get()
        slow = HttpHook(payload_format(FormatName.V2), urls=(sys.argv[2],), timeout=0.3, retries=0)
        try:
            slow.send(sent)
        except HookFailed:
            print("failed")
    """
    with (
        receiving(behave) as receiver,
        speaking(lambda sock: _drip(sock, b"HTTP/1.1 200 OK\r\nA: b", b"c")) as dripping,
    ):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), receiver.url, dripping],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "failed\n"
    assert len(receiver.requests) == at_once
