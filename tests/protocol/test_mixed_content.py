"""Pages of https that get an http URL for their upload: the log says why, now and then."""

from __future__ import annotations

import time
from typing import Any

import pytest

from protocol.client import Client
from protocol.conftest import Serve, on_memory

PAGE = "https://app.example.org"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def create(client: Client, *, peer: str = "127.0.0.1", **headers: Any) -> None:
    environ = {"REMOTE_ADDR": peer}
    assert client.post(1, Origin=PAGE, environ=environ, **headers).status_code == 201


@on_memory
@pytest.mark.parametrize(
    ("given", "peer", "reason"),
    [
        ({}, "127.0.0.1", "set behind_proxy or public_url"),
        (
            {"behind_proxy": "true"},
            "203.0.113.1",
            "the peer 203.0.113.1 is not one of trusted_proxies",
        ),
        (
            {"behind_proxy": "true", "trusted_proxies": "10.0.0.0/8"},
            "",
            "the peer unix is not one of trusted_proxies",
        ),
        (
            {"behind_proxy": "true"},
            "10.0.0.1",
            "the proxy 10.0.0.1 does not send X-Forwarded-Proto: https",
        ),
        ({"public_url": "http://example.org/files"}, "10.0.0.1", "public_url is an http URL"),
    ],
)
def test_the_reason(
    serve: Serve, caplog: pytest.LogCaptureFixture, given: dict[str, str], peer: str, reason: str
) -> None:
    create(serve(**given), peer=peer)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"A page of {PAGE} got the Location http://")
    assert warning.endswith(reason)


@on_memory
def test_not_for_each_request(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    for _ in range(5):
        create(client)
    assert len(warnings(caplog)) == 1
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600)
    create(client)
    assert len(warnings(caplog)) == 2


@on_memory
def test_what_is_well(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    create(serve(behind_proxy="true"), X_Forwarded_Proto="https")
    create(serve(location="relative"))
    create(serve(public_url="https://example.org/files"))
    serve().post(1, Origin="http://app.example.org")
    serve().post(1)
    assert warnings(caplog) == []


@on_memory
def test_what_clients_say_stays_in_its_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    client = serve()
    client.post(1, environ={"HTTP_ORIGIN": "https://\x1b[31m\u0085" + "x" * 10_000})
    (warning,) = warnings(caplog)
    assert warning.isprintable()
    assert len(warning) < 1000
