"""The directory in which the workers of a server put their numbers together.

It belongs to one master process: a new one begins to count at 0, and a worker that is made
anew, also by a reload, goes on with what those before it have counted. Nothing here imports
Prometheus' library before the directory is known, since that decides then where it counts.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tuswsgi.errors import ConfigurationError
from tuswsgi.options import MAIN

#: Names the directory to Prometheus' library.
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class _Own(NamedTuple):
    """The directory that this process has made; it is locked for as long as it is used."""

    path: Path
    fd: int


_own: _Own | None = None


def check_installed() -> None:
    """Find out whether there is what metrics need, without importing it: that must not be
    done before the directory of all processes is known.

    :raises ConfigurationError: if it is missing.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigurationError(
            f"[{MAIN}] metrics: They need prometheus_client: pip install 'tuswsgi[metrics]'"
        )


def open_directory(parent: Path, *, is_successor: bool = False) -> None:
    """Name a directory to this process and to those that it forks, unless that was done.

    What the environment names is emptied; otherwise it is a new one in `parent`, and those
    are removed there that servers of this host have left behind.

    :param is_successor: whether another master still uses what the environment names.
    :raises OSError: if there is no such place.
    """
    global _own
    if _own is not None:
        return
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        if not is_successor:
            for file in Path(given).glob("*.db"):
                file.unlink()
        return
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{socket.gethostname()}-"
    # Otherwise another server might remove the new one before it is locked.
    with _locked(parent):
        for old in parent.glob(f"{prefix}*"):
            _remove_abandoned(old)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).absolute()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Workers inherit it: it ends with the last one of them.
        fcntl.flock(fd, fcntl.LOCK_EX)
    _own = _Own(path, fd)
    os.environ[DIRECTORY_VARIABLE] = str(path)


def close_directory() -> None:
    """Remove the directory, if this process has made it."""
    global _own
    if _own is not None:
        shutil.rmtree(_own.path, ignore_errors=True)
        os.close(_own.fd)
        _own = None
        del os.environ[DIRECTORY_VARIABLE]


def forget_worker(pid: int) -> None:
    """Take out of the sums what was true of a worker only while it lived."""
    if DIRECTORY_VARIABLE in os.environ:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid)  # type: ignore[no-untyped-call]


@contextmanager
def _locked(directory: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _remove_abandoned(directory: Path) -> None:
    try:
        with _locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        pass  # somebody uses it, or has removed it
