"""A server goes on with what a rustus left: its records are copied, its data directory is ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rustus import Rustus, in_files

from e2e.client import MB, content, sha256_of
from e2e.conftest import Serve, Server

STORES = ["db-info-storage", "file-info-storage"]


@pytest.fixture
def rustus(tmp_path: Path) -> Rustus:
    # By default rustus keeps records beside the bytes.
    return Rustus(tmp_path / "data", in_files(tmp_path / "data"))


@pytest.fixture(params=STORES)
def take_over(request: pytest.FixtureRequest, rustus: Rustus, serve: Serve) -> Callable[[], Server]:
    """Copy rustus' records into a configured store, and start a server on it."""
    flags = ["--info-storage", request.param]

    def start() -> Server:
        command = [sys.executable, "-m", "tuswsgi", "info", "copy", *flags]
        places = ["--from", f"rustus+file://{rustus.data_dir}", "--data-dir", str(rustus.data_dir)]
        subprocess.run([*command, *places], check=True, timeout=60)
        return serve(*flags)

    return start


def test_an_upload_goes_on(rustus: Rustus, take_over: Callable[[], Server]) -> None:
    data = content(3 * MB)
    whole = hashlib.sha256(data).hexdigest()
    meta = {"filename": "größe.bin", "empty": ""}
    known = rustus.upload(data[:MB], len(data), metadata=meta)
    # Its bytes came further than its record tells: rustus died in between.
    further = rustus.upload(data[: 2 * MB], len(data), offset=MB, directory="")
    deferred = rustus.upload(data[:MB], None)
    client = take_over().client
    response = client.head(f"/files/{known}")
    assert (response.status, response.offset) == (200, MB)
    assert response.headers["upload-length"] == str(len(data))
    pairs = [pair.split() for pair in response.headers["upload-metadata"].split(",")]
    assert pairs == [["filename", "Z3LDtsOfZS5iaW4="], ["empty"]]
    assert client.offset(f"/files/{further}") == 2 * MB
    response = client.head(f"/files/{deferred}")
    assert (response.offset, response.headers["upload-defer-length"]) == (MB, "1")
    client.finish(f"/files/{known}", data)
    client.finish(f"/files/{further}", data)
    rest = {"Upload_Length": str(len(data))}
    assert client.patch(f"/files/{deferred}", MB, data[MB:], **rest).status == 204
    for id, directory in ((known, "2024/5/1"), (further, ""), (deferred, "2024/5/1")):
        response = client.get(f"/files/{id}")
        assert response.status == 200
        assert hashlib.sha256(response.body).hexdigest() == whole
        assert sha256_of(rustus.data_dir / directory / id) == whole


def test_finished_uploads_are_there(rustus: Rustus, take_over: Callable[[], Server]) -> None:
    data = content(MB)
    parts = [
        rustus.upload(half, MB // 2, is_partial=True) for half in (data[: MB // 2], data[MB // 2 :])
    ]
    final = rustus.upload(data, MB, is_final=True, parts=parts)
    plain = rustus.upload(data, MB)
    empty = rustus.upload(b"", 0)
    client = take_over().client
    for id in (final, plain):
        assert client.offset(f"/files/{id}") == MB
        assert client.get(f"/files/{id}").body == data
    assert client.get(f"/files/{empty}").status == 200
    concat = "final;" + " ".join(f"/files/{part}" for part in parts)
    assert client.head(f"/files/{final}").headers["upload-concat"] == concat
    assert client.head(f"/files/{parts[0]}").headers["upload-concat"] == "partial"
    assert client.patch(f"/files/{final}", MB, b"").status == 403
    again = client.create_final([f"/files/{part}" for part in parts])
    assert client.get(again).body == data
    assert client.request("DELETE", f"/files/{plain}", {"Tus-Resumable": "1.0.0"}).status == 204
    assert not (rustus.data_dir / "2024/5/1" / plain).exists()


def test_parts_of_rustus_become_a_final_upload(
    rustus: Rustus, take_over: Callable[[], Server]
) -> None:
    data = content(MB)
    first = rustus.upload(data[: MB // 2], MB // 2, is_partial=True)
    second = rustus.upload(data[MB // 2 : MB // 2 + 5], MB // 2, is_partial=True)
    client = take_over().client
    final = client.create_final([f"/files/{first}", f"/files/{second}"])
    client.finish(f"/files/{second}", data[MB // 2 :])
    assert client.offset(final) == MB
    assert client.get(final).body == data
