"""Trouble with a disk that passes: clients are told to come back, and the log says what it was."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest

from tuswsgi import Tus
from tuswsgi.datastores.memory import MemoryDataStore

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {"Content-Type": "application/offset+octet-stream"}
MEMORY = {"info_storage": "memory-info-storage", "locker": "memory-locker"}


def client_of(**options: Any) -> Any:
    app = flask.Flask("embedding")
    app.register_blueprint(Tus(**MEMORY, **options).blueprint(), url_prefix="/files")
    return app.test_client()


class Broken(MemoryDataStore):
    """A disk that fails when it is asked for anything but a new upload."""

    number = errno.EIO

    def append(self, *args: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))

    offset = append


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("Nothing may be mounted here.")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def check(answer: Any, caplog: pytest.LogCaptureFixture, number: int) -> None:
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert os.strerror(number) not in answer.text
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert os.strerror(number) in line
    assert "Traceback" not in caplog.text
    caplog.clear()


def test_a_disk_that_became_read_only(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(data_dir=disk)
    url = client.post("/files", headers=TUS | {"Upload-Length": "3"}).headers["Location"]
    patch = {"headers": TUS | BYTES | {"Upload-Offset": "0"}, "data": b"abc"}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check(client.patch(url, **patch), caplog, errno.EROFS)
    check(client.post("/files", headers=TUS | {"Upload-Length": "3"}), caplog, errno.EROFS)
    check(client.post("/files", headers=TUS | {"Upload-Length": "0"}), caplog, errno.EROFS)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert client.patch(url, **patch).status_code == 204


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_disk_that_fails(number: int, caplog: pytest.LogCaptureFixture) -> None:
    store = Broken()
    store.number = number
    client = client_of(data_store=store)
    url = client.post("/files", headers=TUS | {"Upload-Length": "3"}).headers["Location"]
    headers = TUS | BYTES | {"Upload-Offset": "0"}
    check(client.patch(url, headers=headers, data=b"abc"), caplog, number)
    check(client.head(url, headers=TUS), caplog, number)
