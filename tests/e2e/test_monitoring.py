"""``/health`` and ``/ready`` of real servers."""

from __future__ import annotations

import json

from e2e.client import TUS, content, wait_until
from e2e.conftest import Serve, free_port


def test_beside_uploads_at_the_root(serve: Serve) -> None:
    server, data = serve("--url", "/"), content(100_000)
    client = server.client
    client.url = "/"
    path = client.create(len(data))
    client.finish(path, data)
    assert client.get(path).body == data
    for _ in range(4):
        answer = client.request("GET", "/health", {})
        assert (answer.status, answer.body) == (200, b"ok")
        assert client.request("GET", "/ready", {}).status == 200
    assert client.request("HEAD", "/other", TUS).status == 404


def test_a_directory_that_comes_back(serve: Serve) -> None:
    server = serve(workers=1)  # another one might begin to work, and make the directory, later
    away = server.data_dir.with_name("away")

    def status() -> int:
        return server.client.request("GET", "/ready", {}).status

    assert status() == 200
    server.data_dir.rename(away)
    wait_until(lambda: status() == 503, "a server that is not ready")
    assert server.client.request("GET", "/health", {}).status == 200
    away.rename(server.data_dir)
    wait_until(lambda: status() == 200, "a server that is ready again")


def test_a_broker_that_is_away(serve: Serve) -> None:
    url = f"amqp://guest:secret@127.0.0.1:{free_port()}"
    server = serve("--hooks-amqp-url", url, "--ready-needs-hooks")
    answer = server.client.request("GET", "/ready", {})
    assert answer.status == 503
    checks = json.loads(answer.body)["checks"]
    assert checks.pop("hooks_amqp") == "It cannot be used; the log says why."
    assert set(checks.values()) == {"ok"}
    assert b"secret" not in answer.body
    assert "secret" not in server.log
