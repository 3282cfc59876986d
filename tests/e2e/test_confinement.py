"""The server needs no more than our systemd unit and our image leave it.

The root file system is read-only but for the two directories of the unit, there is no home,
the user has no rights, and nobody may get more.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from private_servers import program

from e2e.client import content
from e2e.conftest import Server, free_port, running

ROOT = Path(__file__).parent.parent.parent

#: The number of a user and of a group that own nothing.
NOBODY = "10001"


def command_of_unit(state: Path, runtime: Path) -> list[str]:
    """Return the arguments of the program in our unit."""
    lines = (ROOT / "conf" / "tuswsgi.service").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("ExecStart="))
    for old, new in {
        "${STATE_DIRECTORY}": str(state),
        "${RUNTIME_DIRECTORY}": str(runtime),
        "/etc/tuswsgi.ini": str(ROOT / "conf" / "tuswsgi.ini"),
    }.items():
        assert old in line
        line = line.replace(old, new)
    return shlex.split(line)[1:]


@pytest.fixture
def confined(tmp_path: Path) -> list[str]:
    """A command that runs another one in such an environment."""
    state, runtime = tmp_path / "state", tmp_path / "run"
    command = [program("bwrap"), "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for directory in (state, runtime):
        directory.mkdir()
        command += ["--bind", str(directory), str(directory)]
    command += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"]
    # What PrivateTmp is to the unit.
    command += ["--tmpfs", "/dev/shm", "--chdir", "/", "--die-with-parent"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"No namespaces may be made here: {tried.stderr.strip()}")
    return command


@pytest.mark.parametrize("listening", ["tcp", "unix"])
def test_confined(confined: list[str], tmp_path: Path, listening: str) -> None:
    state, runtime = tmp_path / "state", tmp_path / "run"
    command = [*confined, sys.executable, "-m", "tuswsgi", *command_of_unit(state, runtime)]
    if listening == "tcp":
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
    else:
        command += ["--unix-sock", str(runtime / "http.sock")]
    environ = {
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
        "TMPDIR": "/dev/shm",
    }
    data = content(3_000_000)
    with running(Server([*command, "--workers", "2"], state, environ)) as server:
        parts = []
        for half in (data[:1_500_000], data[1_500_000:]):
            parts.append(server.client.create(len(half), Upload_Concat="partial"))
            server.client.finish(parts[-1], half)
        path = server.client.create_final(parts)
        assert server.client.get(path).body == data
        assert server.file(path).read_bytes() == data
