"""Proxies in front of the server, with the files that we ship for them.

Requests go over TLS by HTTP/1.1, where the test decides about each byte, and by HTTP/2
(``curl``). For an upload to be resumed, a proxy has to pass on what it got before it got all.
"""

from __future__ import annotations

import io
import json
import random
import signal
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import pytest
from private_servers import program
from tusclient.client import TusClient

from e2e.client import (
    BYTES,
    TUS,
    Client,
    Origin,
    Response,
    content,
    sha1,
    wait_until,
)
from e2e.conftest import SERVE, Server, running
from e2e.proxies import URL, Apache, Caddy, Nginx, Proxy
from e2e.uploader import Uploader

SIZE = 5_000_000

PROXIES = {
    "nginx": (Nginx, False),
    "nginx, unix socket": (Nginx, True),
    "caddy": (Caddy, False),
    "apache": (Apache, False),
}


@dataclass(frozen=True)
class Front:
    """A server and the proxy in front of it.

    :param client: a client that talks to the proxy.
    """

    server: Server
    proxy: Proxy
    client: Client
    certificate: Path

    @property
    def url(self) -> str:
        return f"https://{self.client.origin.host}{URL}"


@contextmanager
def fronted(name: str, directory: Path, tls: tuple[list[str], ssl.SSLContext]) -> Iterator[Front]:
    """Run a server, of which a hook writes down who creates uploads, behind a proxy."""
    kind, by_unix = PROXIES[name]
    (_, certificate, _, key), context = tls
    hook = directory / "hook"
    hook.write_text(f'#!/bin/sh\necho "$2" >> {directory}/heard\n')
    hook.chmod(0o755)
    command = [*SERVE, "--data-dir", str(directory / "data"), "--workers", "2", "--behind-proxy"]
    command += ["--max-file-size", "50MB", "--hooks", "pre-create", "--hooks-file", str(hook)]
    command += ["--unix-sock", str(directory / "x.sock")] if by_unix else []
    with running(Server(command, directory / "data")) as server:
        proxy = kind(server.client.origin.address, Path(certificate), Path(key))
        try:
            client = Client(Origin(("127.0.0.1", proxy.port), context), URL)
            yield Front(server, proxy, client, Path(certificate))
        finally:
            proxy.remove()


@pytest.fixture(scope="module", params=PROXIES)
def front(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tls_flags: tuple[list[str], ssl.SSLContext],
) -> Iterator[Front]:
    """One of the proxies; tests must leave it and its server running."""
    with fronted(request.param, tmp_path_factory.mktemp("proxy"), tls_flags) as front:
        yield front


#: For what the others do not do: a client of HTTP/1.1 that falls silent in mid-body gets no
#: answer from them, and Apache forgets that there are to be trailers.
nginx_alone = pytest.mark.parametrize("front", ["nginx", "nginx, unix socket"], indirect=True)


class Http2:
    """Sends requests by HTTP/2, with curl."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def command(self, method: str, path: str, *arguments: str, **headers: str | int) -> list[str]:
        command = [program("curl"), "--silent", "--show-error", "--http2", "--include"]
        command += ["--cacert", str(self._front.certificate), "--max-time", "60"]
        command += ["--head"] if method == "HEAD" else ["--request", method]
        for name, value in {"Tus-Resumable": "1.0.0", **headers}.items():
            command += ["--header", f"{name.replace('_', '-')}: {value}"]
        return [*command, *arguments, f"https://{self._front.client.origin.host}{path}"]

    def request(
        self, method: str, path: str, *arguments: str, body: bytes = b"", **headers: str | int
    ) -> Response:
        command = self.command(method, path, *arguments, **headers)
        done = subprocess.run(command, capture_output=True, timeout=90, input=body)
        assert done.returncode == 0, done.stderr
        head, _, rest = done.stdout.partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        protocol, status, *_ = line.split(" ")
        assert protocol == "HTTP/2", line
        pairs = (line.partition(":") for line in lines)
        return Response(int(status), {name: value.strip() for name, _, value in pairs}, rest)


PATCH: dict[str, str | int] = {"Content_Type": "application/offset+octet-stream"}


@pytest.mark.parametrize("length", ["known length", "unknown length"])
def test_http2(front: Front, tmp_path: Path, length: str) -> None:
    http2, data, file = Http2(front), content(SIZE), tmp_path / "file"
    file.write_bytes(data[1_000_000:])
    created = http2.request("POST", URL, Upload_Length=SIZE)
    assert created.status == 201
    location = urlsplit(created.headers["location"])
    assert (location.scheme, location.netloc) == ("https", front.client.origin.host)
    assert location.path.startswith(URL)
    path = location.path
    sent = http2.request(
        *("PATCH", path, "--data-binary", "@-"), body=data[:1_000_000], **PATCH, Upload_Offset=0
    )
    assert (sent.status, sent.offset) == (204, 1_000_000)
    assert http2.request("HEAD", path).offset == 1_000_000
    if length == "known length":
        how: tuple[str, ...] = ("--data-binary", f"@{file}")
        body = b""
    else:
        how, body = ("--upload-file", "-"), data[1_000_000:]
    sent = http2.request("PATCH", path, *how, body=body, **PATCH, Upload_Offset=1_000_000)
    assert (sent.status, sent.offset) == (204, SIZE)
    assert http2.request("GET", path).body == data
    part = http2.request("GET", path, Range="bytes=1000-1999")
    assert (part.status, part.body) == (206, data[1000:2000])
    assert http2.request("DELETE", path).status == 204
    assert http2.request("HEAD", path).status == 410


def test_what_arrives_is_passed_on_at_once(front: Front) -> None:
    client, data = front.client, content(SIZE)
    path = client.create(SIZE)
    for length, until in ((SIZE, 2_000_001), (None, 3_500_000)):
        start = client.offset(path)
        body = data[start:until]
        rest = None if length is None else length - start
        with client.start_patch(path, start, rest, body) as patch:
            wait_until(lambda until=until: front.server.stored(path) == until, "all that was sent")
            patch.reset()
        assert client.offset(path) == until
    client.finish(path, data)
    assert client.get(path).body == data


def test_an_abort_by_http2(front: Front, tmp_path: Path) -> None:
    client, data, file = front.client, content(SIZE), tmp_path / "file"
    file.write_bytes(data)
    path = client.create(SIZE)
    how = ("--data-binary", f"@{file}", "--limit-rate", "1M")
    command = Http2(front).command("PATCH", path, *how, **PATCH, Upload_Offset=0)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as curl:
        wait_until(lambda: front.server.stored(path) > 500_000, "bytes")
        curl.kill()
    assert 500_000 < client.offset(path) < SIZE
    client.finish(path, data)
    assert front.server.file(path).read_bytes() == data


@nginx_alone
def test_an_upload_that_another_connection_holds(front: Front) -> None:
    """A proxy keeps its connection to the server while it does not know that a client is gone."""
    client, data = front.client, content(SIZE)
    path = client.create(SIZE)
    with client.start_patch(path, 0, SIZE, data[:1_000_000]) as held:
        wait_until(lambda: front.server.stored(path) == 1_000_000, "bytes")
        client.finish(path, data)
        answer = held.read()
    assert answer.status == 423
    assert int(answer.headers["retry-after"]) > 0
    assert client.get(path).body == data


@nginx_alone
def test_answers_while_the_client_sends(front: Front) -> None:
    client, block = front.client, content(500_000)
    headers = {**BYTES, "Upload-Length": 60_000_000, "Content-Length": 60_000_000}
    with client.connect() as connection:
        connection.send_head("POST", URL, headers)
        assert connection.send_until_answered(block).status == 413
    path = client.create(40_000_000)
    with client.start_patch(path, 1, 40_000_000) as connection:
        assert connection.send_until_answered(block).status == 409


def test_a_stop(tmp_path: Path, tls_flags: tuple[list[str], ssl.SSLContext]) -> None:
    data = content(SIZE)
    with fronted("nginx", tmp_path, tls_flags) as front:
        path = front.client.create(SIZE)
        with front.client.start_patch(path, 0, SIZE, data[:1_000_000]) as patch:
            wait_until(lambda: front.server.stored(path) == 1_000_000, "bytes")
            front.server.signal(signal.SIGTERM)
            answer = patch.read()
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert front.server.wait() == 0


def test_reloads(tmp_path: Path, tls_flags: tuple[list[str], ssl.SSLContext]) -> None:
    """No 502: the connections that nginx keeps are closed when it does not use them."""
    data, done = content(600_000), Event()

    def upload(client: Client) -> Counter[int]:
        statuses: Counter[int] = Counter()
        while not done.is_set():
            path, offset = client.create(len(data)), 0
            while offset < len(data):
                answer = client.patch(path, offset, data[offset : offset + 250_000])
                statuses[answer.status] += 1
                if answer.status != 204:
                    answer = client.head(path)
                    statuses[answer.status] += 1
                offset = answer.offset if answer.status in (200, 204) else offset
        return statuses

    with fronted("nginx", tmp_path, tls_flags) as front, ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(upload, front.client) for _ in range(6)]
        try:
            for _ in range(3):
                old = set(front.server.workers())
                front.server.signal(signal.SIGHUP)
                wait_until(lambda old=old: old.isdisjoint(front.server.workers()), "new workers")
        finally:
            done.set()
        statuses = sum((load.result() for load in loads), Counter[int]())
    print(f"answers during three reloads: {dict(statuses)}")
    assert set(statuses) <= {200, 204, 423, 503}
    assert statuses[204] > 0


def test_ranges(front: Front) -> None:
    client, data = front.client, content(20_000_000)
    path = client.create(len(data))
    client.finish(path, data)
    whole = client.get(path)
    assert (whole.status, whole.body) == (200, data)
    part = client.get(path, Range="bytes=5000000-14999999")
    assert (part.status, part.body) == (206, data[5_000_000:15_000_000])
    assert part.headers["content-range"] == f"bytes 5000000-14999999/{len(data)}"
    etag = whole.headers["etag"]
    assert client.get(path, If_None_Match=etag).status == 304
    assert client.get(path, Range="bytes=20000000-").status == 416


def test_clients_that_break_off(front: Front) -> None:
    client = front.client
    uploaders = [
        Uploader(
            lambda: client,
            content(SIZE, seed),
            random.Random(random.random()),
            client.create(SIZE),
        )
        for seed in range(6)
    ]
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(one.run) for one in uploaders]:
            done.result()
    print(f"answers: {dict(sum((one.statuses for one in uploaders), Counter()))}")
    for one in uploaders:
        assert client.get(one.path).body == one.data


def test_tuspy(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(front.certificate))
    data = content(SIZE)
    uploader = TusClient(front.url).uploader(file_stream=io.BytesIO(data), chunk_size=2_000_000)
    uploader.upload()
    assert uploader.url.startswith(front.url)
    assert front.server.file(uploader.url).read_bytes() == data


LIES = {
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-For": "6.6.6.6",
    "Forwarded": "for=6.6.6.6;host=evil.example;proto=http",
    "X-Forwarded-Server": "evil.example",
    "SCRIPT_NAME": "/evil",
    "Script-Name": "/evil",
    "X-Script-Name": "/evil",
}


def test_what_clients_say_of_proxies(front: Front) -> None:
    answer = front.client.request("POST", URL, {**TUS, "Upload-Length": 1, **LIES})
    assert answer.status == 201
    assert answer.headers["location"].startswith(front.url)
    heard = (front.server.data_dir.parent / "heard").read_text().splitlines()
    assert json.loads(heard[-1])["request"]["remote_addr"] == "127.0.0.1"


def test_only_uploads_get_through(front: Front) -> None:
    for path in ("/health", "/uploads/health", "/metrics", "/uploads/files/../metrics", "/files/"):
        answer = front.client.request("GET", path, {})
        assert answer.status in (400, 403, 404), (path, answer)
        assert "tus-resumable" not in answer.headers


@nginx_alone
def test_checksums_in_trailers(front: Front) -> None:
    """They are lost on the way: nothing of a body that nobody could check is kept."""
    client, data = front.client, content(100_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, None, data, Trailer="Upload-Checksum") as patch:
        patch.send(f"0\r\nUpload-Checksum: {sha1(data)}\r\n\r\n".encode())
        answer = patch.read()
    assert answer.status == 400
    assert b"trailer is missing" in answer.body
    assert client.offset(path) == 0
