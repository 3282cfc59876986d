"""Peers that are no proxies of ours say that they were: nobody believes them.

gunicorn has its own idea of whom to believe (loopback and unix sockets), and requests reach
the application by its parser or past it: what they say must count on none of these ways.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.client import TUS
from e2e.conftest import Serve

#: What nobody says who is no proxy.
LIES = {
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Protocol": "ssl",
    "X-Forwarded-Ssl": "on",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-For": "6.6.6.6",
    "Forwarded": "for=6.6.6.6;host=evil.example;proto=https",
    "X-Real-IP": "6.6.6.6",
    "Script-Name": "/evil",
    "X-Script-Name": "/evil",
    "Path-Info": "/evil",
    "Remote-Addr": "6.6.6.6",
}

#: With an underscore a name is for gunicorn's parser.
UNDERSCORES = {"SCRIPT_NAME": "/evil", "PATH_INFO": "/evil", "REMOTE_USER": "evil"}


@pytest.mark.parametrize("parser", ["short way", "gunicorn's parser"])
@pytest.mark.parametrize(
    "flags",
    [(), ("--behind-proxy", "--trusted-proxies", "203.0.113.0/24")],
    ids=["no proxy", "another proxy"],
)
@pytest.mark.parametrize("listening", ["tcp", "unix"])
def test_untrusted(
    serve: Serve, tmp_path: Path, flags: tuple[str, ...], parser: str, listening: str
) -> None:
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$2" > {tmp_path}/heard\n')
    hook.chmod(0o755)
    if listening == "unix":
        flags = (*flags, "--unix-sock", str(tmp_path / "x.sock"))
    server = serve("--hooks", "pre-create", "--hooks-file", str(hook), *flags, workers=1)
    said = LIES if parser == "short way" else {**LIES, **UNDERSCORES}
    answer = server.client.request("POST", "/files/", {**TUS, "Upload-Length": 1, **said})
    assert answer.status == 201
    url = f"http://{server.client.origin.host}/files/"
    assert answer.headers["location"].startswith(url)
    heard = json.loads((tmp_path / "heard").read_text())["request"]
    assert heard["remote_addr"] == ("127.0.0.1" if listening == "tcp" else None)
    path = answer.headers["location"].removeprefix(url)
    assert server.client.offset(f"/files/{path}") == 0
