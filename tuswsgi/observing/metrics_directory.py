"""The directory in which the workers of a server put their numbers together.

It belongs to one master process: a new one begins to count at 0, and a worker that is made
anew, also by a reload, goes on with what those before it have counted. Nothing here imports
Prometheus' library before the directory is known, since that decides then where it counts.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import MAIN
from tuswsgi.core.process import PerProcess

log = logging.getLogger(__name__)

#: Names the directory to Prometheus' library.
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


#: What the names of the library's files begin with, by the kinds of metrics that we have.
_KINDS = ("counter", "gauge_livesum", "histogram")

#: The bytes of a file at first, as the library makes it; it makes it longer where needed.
_FILE_SIZE = 65536


class _Own(NamedTuple):
    """The directory that this process has made; it is locked for as long as it is used."""

    path: Path
    fd: int


_own: _Own | None = None

#: Whether ``open_directory`` was called, in this process or in the one that forked it.
_is_open = False


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
    global _own, _is_open
    if _is_open:
        return
    _is_open = True
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
    global _own, _is_open
    _is_open = False
    if _own is not None:
        shutil.rmtree(_own.path, ignore_errors=True)
        os.close(_own.fd)
        _own = None
        del os.environ[DIRECTORY_VARIABLE]


def use_slots() -> bool:
    """Whether this process is to count by ``slot``: the directory is our own.

    One that cannot write there now counts for itself alone.
    """
    if not _is_open or DIRECTORY_VARIABLE not in os.environ:
        return False
    try:
        slot()
    except OSError as error:
        log.error("What this process counts is missing in the sums of the metrics: %s", error)
        del os.environ[DIRECTORY_VARIABLE]
        return False
    return True


def slot() -> int:
    """Return the number by which this process counts, and no other one that lives.

    A process that is made anew takes over the number of one that died, and its files: there
    are never more of them than processes at once.
    """
    return _slot.get()


def forget_the_dead() -> None:
    """Take out of the sums what was true of processes only while they lived."""
    for file in _directory().glob("gauge_live*.db"):
        number = file.stem.rpartition("_")[2]
        if number.isdecimal() and (fd := _try_slot(int(number))) is not None:
            file.unlink(missing_ok=True)
            os.close(fd)


def _take_slot() -> int:
    # The descriptor stays open for as long as the process lives.
    number = next(number for number in count() if _try_slot(number) is not None)
    for kind in _KINDS:
        file = _directory() / f"{kind}_{number}.db"
        # What was true of the process before is no more; what it has counted stays.
        if kind.startswith("gauge_live") or not file.exists():
            _make_empty(file)
    return number


def _make_empty(file: Path) -> None:
    """Make a file without numbers, all at once: the library opens it first and then makes it
    long enough, and in between nobody else could read the metrics.
    """
    new = file.with_suffix(".new")
    with new.open("wb") as empty:
        empty.truncate(_FILE_SIZE)
    new.replace(file)


_slot = PerProcess(_take_slot)


def _try_slot(number: int) -> int | None:
    """Lock a number and return the descriptor that holds it, ``None`` if it is taken."""
    fd = os.open(_directory() / f"{number}.slot", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _directory() -> Path:
    return Path(os.environ[DIRECTORY_VARIABLE])


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
