"""The hooks that rustus' documentation shows, run as it shows them: they are what users have."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.client import TUS, Response, wait_until
from e2e.conftest import SERVE, Server, running

SINGLE_FILE_HOOK = r"""#!/bin/bash

# Hook name would be "pre-create", "post-create" and so on.
HOOK_NAME="$1"
HOOK_INFO="$2"
MEME="$(echo "$HOOK_INFO" | jq ".upload .metadata .meme" | xargs)"

# Here we check if name in metadata is equal to pepe.
if [[ $MEME = "pepe" ]]; then
  echo "This meme isn't allowed" 1>&2;
  exit 1
fi
"""

SERVER = """
from fastapi import FastAPI, Header, HTTPException
from typing import Optional

app = FastAPI()


@app.post("/hooks")
def hook(
        authorization: Optional[str] = Header(None),
        hook_name: Optional[str] = Header(None),
):
    print(f"Received: {hook_name}")
    if authorization != "Bearer jwt":
        raise HTTPException(401)
    return None
"""


@contextmanager
def serving(
    tmp_path: Path, *flags: str, environ: Mapping[str, str] | None = None
) -> Iterator[Server]:
    data_dir = tmp_path / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "1", *flags]
    with running(Server(command, data_dir, environ)) as server:
        yield server


def create(server: Server, meme: str = "doge", **headers: str) -> Response:
    metadata = f"meme {b64encode(meme.encode()).decode()}"
    named = {"Upload-Length": 5, "Upload-Metadata": metadata, **headers}
    return server.client.request("POST", "/files/", {**TUS, **named})


def write_hook(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("way", ["flag", "RUSTUS_HOOKS_FILE", "TUSWSGI_HOOKS_FILE"])
def test_the_single_file_hook(tmp_path: Path, way: str) -> None:
    hook = tmp_path / "hooks" / "single_file_hook.sh"
    write_hook(hook, SINGLE_FILE_HOOK)
    flags = ["--hooks-file", str(hook)] if way == "flag" else []
    environ = {} if way == "flag" else {way: str(hook)}
    with serving(tmp_path, *flags, environ=environ) as server:
        refused = create(server, "pepe")
        assert refused.status == 400
        assert refused.body.strip() == b"This meme isn't allowed"
        assert create(server).status == 201


def test_the_directory_of_hooks(tmp_path: Path) -> None:
    told = tmp_path / "told"
    for name in ("post-create", "post-finish", "post-receive", "post-terminate", "pre-create"):
        script = f"""#!/bin/sh\necho {name} "$(echo "$1" | jq -r .upload.offset)" >> "{told}"\n"""
        write_hook(tmp_path / "hooks" / name, script)
    with serving(tmp_path, "--hooks-dir", str(tmp_path / "hooks")) as server:
        path = server.client.create(5)
        server.client.patch(path, 0, b"hel")
        server.client.finish(path, b"hello")
        wait_until(lambda: "post-finish 5" in told.read_text(), "post-finish")
        events = told.read_text().splitlines()
        assert events[0] == "pre-create 0"
        assert set(events) <= {"pre-create 0", "post-create 0", "post-receive 3", "post-finish 5"}
        assert events.index("post-create 0") < events.index("post-finish 5")
        # The directory has no program for pre-terminate, which "throws an error".
        assert server.client.request("DELETE", path, TUS).status >= 500


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The example's web server; its URL, and the file of what it says."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    (tmp_path / "server.py").write_text(SERVER)
    said = tmp_path / "said"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "uvicorn", "server:app", "--port", "0"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        ready = r"running on (http://127\.0\.0\.1:\d+)"
        wait_until(lambda: re.search(ready, said.read_text()), "the web server")
        found = re.search(ready, said.read_text())
        assert found
        yield f"{found[1]}/hooks", said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("way", ["flag", "RUSTUS_", "TUSWSGI_"])
def test_the_web_server(tmp_path: Path, web_server: tuple[str, Path], way: str) -> None:
    url, said = web_server
    flags = ["--hooks-http-urls", url, "--hooks-http-proxy-headers", "Authorization"]
    environ = {
        f"{way}HOOKS_HTTP_URLS": url,
        f"{way}HOOKS_HTTP_PROXY_HEADERS": "Authorization",
    }
    # More time than a busy machine needs.
    flags = [*(flags if way == "flag" else []), "--http-hook-timeout", "30"]
    with serving(tmp_path, *flags, environ={} if way == "flag" else environ) as server:
        refused = create(server)
        assert (refused.status, refused.body) == (401, b'{"detail":"Unauthorized"}')
        assert refused.headers["content-type"] == "application/json"
        assert create(server, Authorization="Bearer jwt").status == 201
        wait_until(lambda: "Received: post-create" in said.read_text(), "post-create")
