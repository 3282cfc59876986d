"""The blueprint in an application of somebody's own, under the servers that people use."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.client import TUS, chunk, content, patch_headers, wait_until
from e2e.conftest import OTHERS_READY, Server, running

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

GUNICORN = (sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", "--no-control-socket")
EMBEDDED = ("--chdir", str(HERE), "embedded_app:app")

COMMANDS = {
    "gevent": (*GUNICORN, "-w", "2", "-k", "gevent", *EMBEDDED),
    "our worker": (*GUNICORN, "-w", "2", "-k", "tuswsgi.serving.worker.TusWorker", *EMBEDDED),
    "gthread": (*GUNICORN, "-w", "2", "-k", "gthread", "--threads", "8", *EMBEDDED),
    "sync": (*GUNICORN, "-w", "2", "-k", "sync", *EMBEDDED),
    "development server": (
        *(sys.executable, "-m", "flask", "--app", str(HERE / "embedded_app.py")),
        *("run", "--host", "127.0.0.1", "--port", "0"),
    ),
    "our settings": (
        *(sys.executable, "-m", "gunicorn", "-c", str(ROOT / "conf" / "gunicorn.conf.py")),
        *("--chdir", str(ROOT), "wsgi:application"),
    ),
}

#: Servers that keep a connection whose body was refused and drained.
KEEP_ALIVE = ("gevent", "our worker", "gthread", "our settings")

#: Servers whose readers can be interrupted: Flask's waits for a silent client.
INTERRUPTIBLE = (*KEEP_ALIVE, "sync")


@pytest.fixture(scope="module", params=COMMANDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def embedded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("embedded") / "data"
    environ = {
        "DATA_DIR": str(data_dir),
        "TUSWSGI_DATA_DIR": str(data_dir),
        "TUSWSGI_HOST": "127.0.0.1",
        "TUSWSGI_PORT": "0",
        "TUSWSGI_WORKERS": "2",
        "PYTHONPATH": str(ROOT),
    }
    with running(Server(COMMANDS[kind], data_dir, environ, ready=OTHERS_READY)) as server:
        yield server


def test_upload_and_download(embedded: Server, kind: str) -> None:
    client, data = embedded.client, content(5_000_000)
    path = client.create(len(data), Upload_Metadata="filename YS5iaW4=")
    assert client.patch(path, 0, data[:2_000_000]).offset == 2_000_000
    client.finish(path, data)
    response = client.get(path)
    assert response.body == data
    assert 'filename="a.bin"' in response.headers["content-disposition"]
    assert client.get(path, Range="bytes=10-19").body == data[10:20]
    if kind != "our settings":
        assert client.request("GET", "/", {}).body == b"my own page"
    assert client.request("DELETE", path, TUS).status == 204
    assert client.head(path).status == 410


def test_hooks_know_the_client(embedded: Server, kind: str) -> None:
    if kind == "our settings":
        pytest.skip("an application without hooks")
    with embedded.client.connect() as connection:
        port = connection.sock.getsockname()[1]
        assert connection.request("POST", "/files/", {**TUS, "Upload-Length": 5}).status == 201
    assert f"127.0.0.1 {port}" in embedded.data_dir.with_name("clients").read_text().splitlines()


def test_head_says_nothing_wrong_of_the_length(embedded: Server) -> None:
    client = embedded.client
    path = client.create(5)
    for data, headers, length in ((b"", TUS, None), (b"hello", TUS, None), (b"", {}, "5")):
        client.patch(path, client.offset(path), data)
        with client.connect() as connection:
            connection.send(connection.head("HEAD", path, headers))
            answer = connection.read()
            assert answer.status == 200
            assert answer.headers.get("content-length") == length
            if not answer.closes:
                # Nothing else is taken for the end of this answer.
                assert connection.request("HEAD", path, TUS).status == 200


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "reset"])
def test_abort_and_resume(embedded: Server, reset: bool) -> None:
    client, data = embedded.client, content(3_000_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, len(data)) as connection:
        connection.send(data[:1_234_567])
        if reset:
            wait_until(lambda: embedded.stored(path) == 1_234_567, "bytes on disk")
            connection.reset()
    wait_until(lambda: embedded.stored(path) == 1_234_567, "bytes on disk")
    assert client.offset(path) == 1_234_567
    client.finish(path, data)
    assert client.get(path).body == data


@pytest.mark.parametrize("size", [100, 200_000])
def test_a_small_refused_body(embedded: Server, kind: str, size: int) -> None:
    client = embedded.client
    path = client.create(10**9)
    body = (f"DELETE {path} HTTP/1.1\r\nHost: x\r\nTus-Resumable: 1.0.0\r\n\r\n" * 4000).encode()
    with client.connect() as connection:
        answer = connection.request("PATCH", path, patch_headers(5), body[:size])
        assert (answer.status, answer.offset) == (409, 0)
        if kind in KEEP_ALIVE:
            assert connection.request("HEAD", path, TUS).offset == 0
        else:
            assert connection.is_closed()
    assert client.offset(path) == 0


def test_a_refusal_does_not_wait_for_the_rest(embedded: Server, kind: str) -> None:
    client = embedded.client
    path = client.create(10**9)
    with client.connect() as connection:
        connection.send(connection.head("PATCH", path, patch_headers(5, 1000)) + bytes(10))
        answer = connection.read()
        assert (answer.status, answer.offset) == (409, 0)
        assert answer.closes is (kind not in KEEP_ALIVE)
        if kind in KEEP_ALIVE:
            connection.send(bytes(990))
            assert connection.request("HEAD", path, TUS).offset == 0
    assert client.offset(path) == 0


def test_a_large_refused_body(embedded: Server, kind: str) -> None:
    client = embedded.client
    path = client.create(10**9)
    with client.connect() as connection:
        connection.send_head("PATCH", path, patch_headers(5, 50_000_000))
        answer = connection.send_until_answered(bytes(100_000))
        assert (answer.status, answer.offset) == (409, 0)
        if kind != "development server":  # that one reads on before it closes
            assert connection.is_closed()
    assert client.offset(path) == 0


def test_takeover(embedded: Server, kind: str) -> None:
    if kind not in INTERRUPTIBLE:
        pytest.skip("Flask's development server waits for a silent client")
    client, data = embedded.client, content(1_000_000)
    path = client.create(len(data))
    for offset in range(0, 1_000_000, 200_000):
        part = data[offset : offset + 200_000]
        with client.start_patch(path, offset, len(data) - offset, part) as connection:
            wait_until(lambda end=offset + 200_000: embedded.stored(path) == end, "bytes on disk")
            if offset < 800_000:
                assert client.offset(path) == offset + 200_000
                answer = connection.read()
                assert (answer.status, answer.closes) == (423, True)
            else:
                assert connection.read().status == 204
    assert client.get(path).body == data


def test_chunked_bodies(embedded: Server, kind: str) -> None:
    if kind == "development server":
        pytest.skip("Flask's development server speaks HTTP/1.0")
    client, data = embedded.client, content(300_000)
    path = client.create(len(data))
    with client.start_patch(path, 0, None) as connection:
        for start in range(0, 200_000, 70_000):
            connection.send(chunk(data[start : min(start + 70_000, 200_000)]))
        wait_until(lambda: embedded.stored(path) == 200_000, "bytes on disk")
        assert client.offset(path) == 200_000
        assert connection.read().status == 423
    with client.start_patch(path, 200_000, None) as connection:
        # The end is there before the server begins to wait for it.
        connection.send(chunk(data[200_000:250_000]) + chunk(data[250_000:]) + chunk(b""))
        assert connection.read().offset == len(data)
    assert client.get(path).body == data


GRACEFUL: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "gevent": lambda conf: (*GUNICORN, "-w", "2", "-k", "gevent", "-c", str(conf), *EMBEDDED),
    "gthread": lambda conf: (*GUNICORN, "-w", "2", "-k", "gthread", "-c", str(conf), *EMBEDDED),
    "sync": lambda conf: (*GUNICORN, "-w", "2", "-k", "sync", "-c", str(conf), *EMBEDDED),
}


def test_the_application_stops_an_upload(embedded: Server, kind: str) -> None:
    if kind not in INTERRUPTIBLE or kind == "our settings":
        pytest.skip("no application of ours, or one that waits for a silent client")
    path, data = embedded.client.create(1_000_000), content(1000)
    with embedded.client.start_patch(path, 0, 1_000_000, data) as patch:
        wait_until(lambda: embedded.stored(path) == len(data), "bytes on disk")
        stopped = embedded.client.request("POST", f"/stop/{path.rpartition('/')[2]}", {})
        assert (stopped.status, stopped.body) == (200, b"True")
        assert patch.read().status == 423
    assert embedded.client.head(path).status == 410
    assert not embedded.file(path).exists()


@pytest.mark.parametrize("worker", GRACEFUL)
def test_stop_on_sigterm(tmp_path: Path, worker: str) -> None:
    conf = tmp_path / "conf.py"
    conf.write_text(
        "graceful_timeout = 60\n"
        "def post_worker_init(worker):\n"
        "    import embedded_app\n"
        "    embedded_app.tus.stop_on_sigterm()\n"
    )
    environ = {"DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    server = Server(GRACEFUL[worker](conf), tmp_path / "data", environ, ready=OTHERS_READY)
    with running(server):
        data = content(1_000_000)
        path = server.client.create(len(data))
        with server.client.start_patch(path, 0, len(data), data[:600_000]) as connection:
            wait_until(lambda: server.stored(path) == 600_000, "bytes on disk")
            server.signal(signal.SIGTERM)
            answer = connection.read()
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) > 0
            assert answer.closes
        assert server.wait(30) == 0
        server.restart()
        assert server.client.offset(path) == 600_000
        server.client.finish(path, data)
        assert server.client.get(path).body == data
