"""Commands that root runs beside a server of another user: nothing of theirs is in its way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.client import content
from e2e.conftest import SERVE, Server, running

USER, GROUP = 4711, 4712

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A directory of the server's user, in one that this user can pass."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    (directory / "data").mkdir(mode=0o750)
    os.chown(directory / "data", USER, GROUP)
    yield directory / "data"
    shutil.rmtree(directory)


def as_user(*command: str) -> list[str]:
    ids = (f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups")
    return ["setpriv", *ids, *command]


def tuswsgi(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuswsgi", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def owners(directory: Path) -> set[tuple[int, int]]:
    found = [path.lstat() for path in (directory, *directory.rglob("*"))]
    return {(one.st_uid, one.st_gid) for one in found}


STORES = pytest.mark.parametrize("info_storage", ["db-info-storage", "file-info-storage"])


@STORES
def test_the_server_goes_on_after_a_command_of_roots(data_dir: Path, info_storage: str) -> None:
    flags = ("--data-dir", str(data_dir), "--info-storage", info_storage)
    server = Server(as_user(*SERVE, *flags, "--workers", "2"), data_dir)
    with running(server):
        paths = [server.client.create(10) for _ in range(150)]
        ids = [path.rpartition("/")[2] for path in paths[:100]]
        tuswsgi("uploads", "rm", "--yes", *ids, *flags)
        tuswsgi("gc", *flags)
        answers = [server.client.patch(path, 0, content(10)).status for path in paths[100:]]
        assert answers == [204] * 50
        made = {server.client.patch(server.client.create(1), 0, b"x").status for _ in range(70)}
        assert made == {204}
        assert owners(data_dir) == {(USER, GROUP)}


@STORES
def test_a_command_before_the_first_start(data_dir: Path, info_storage: str) -> None:
    flags = ("--data-dir", str(data_dir), "--info-storage", info_storage)
    tuswsgi("gc", *flags)
    assert owners(data_dir) == {(USER, GROUP)}
    with running(Server(as_user(*SERVE, *flags), data_dir)) as server:
        assert server.client.patch(server.client.create(1), 0, b"x").status == 204


def test_a_group_that_shares_the_directory(data_dir: Path) -> None:
    """The directory may be root's: who is in its group can go on all the same."""
    os.chown(data_dir, 0, GROUP)
    data_dir.chmod(0o2770)
    flags = ("--data-dir", str(data_dir), "--info-storage", "file-info-storage")
    tuswsgi("uploads", "list", *flags)
    with running(Server(as_user(*SERVE, *flags), data_dir)) as server:
        paths = [server.client.create(1) for _ in range(80)]
        assert {server.client.patch(path, 0, b"x").status for path in paths} == {204}


@pytest.mark.parametrize("target", ["sqlite:///{}/new.sqlite3", "file://{}/new"])
def test_copied_records_are_the_servers(data_dir: Path, target: str) -> None:
    flags = ("--data-dir", str(data_dir))
    dsn = target.format(data_dir)
    with running(Server(as_user(*SERVE, *flags), data_dir)) as server:
        path = server.client.create(1)
    tuswsgi("info", "copy", "--to", dsn, *flags)
    assert owners(data_dir) == {(USER, GROUP)}
    store = ("--info-db-dsn", dsn)
    if dsn.startswith("file:"):
        store = ("--info-storage", "file-info-storage", "--info-dir", str(data_dir / "new"))  # type: ignore[assignment]
    with running(Server(as_user(*SERVE, *flags, *store), data_dir)) as server:
        assert server.client.patch(path, 0, b"x").status == 204
