"""The directory in which the workers of a server keep their metrics, for prometheus_client.

It belongs to one master process: a new master starts at 0, and a new worker, also after a
reload, continues the files of its predecessor. prometheus_client decides at its import where
it keeps values, so nothing here imports it.
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

#: The variable from which prometheus_client takes the directory.
DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

#: The prefixes of prometheus_client's files, by the kinds of metrics that we have.
_KINDS = ("counter", "gauge_livesum", "histogram")

#: The initial size of prometheus_client's files in bytes.
_FILE_SIZE = 65536


class _Own(NamedTuple):
    """The directory that this process has made, locked while it is used."""

    path: Path
    fd: int


_own: _Own | None = None

#: Whether ``open_directory`` was called, in this process or in the one that forked it.
_is_open = False


def check_installed() -> None:
    """Check that prometheus_client is installed, without importing it.

    :raises ConfigurationError: if it is missing.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigurationError(
            f"[{MAIN}] metrics: They need prometheus_client: pip install 'tuswsgi-server[metrics]'"
        )


def open_directory(parent: Path, *, is_successor: bool = False) -> None:
    """Set the directory of this process and of those that it forks, unless it is set.

    A directory that the environment names is emptied. Otherwise a new one is made in
    `parent`, and abandoned ones of this host are removed there.

    :param is_successor: whether another master still uses the directory of the environment.
    :raises OSError: if the directory cannot be made.
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
    # Without it another server could remove the new directory before it is locked.
    with _locked(parent):
        for old in parent.glob(f"{prefix}*"):
            _remove_abandoned(old)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).absolute()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Workers inherit the lock: it lasts until the last of them ends.
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
    """Whether this process keeps its metrics by ``slot``, in the common directory.

    A process that cannot write there keeps them for itself.
    """
    if not _is_open or DIRECTORY_VARIABLE not in os.environ:
        return False
    try:
        slot()
    except OSError as error:
        log.error("The metrics of this worker are missing in the sums: %s", error)
        del os.environ[DIRECTORY_VARIABLE]
        return False
    return True


def slot() -> int:
    """Return the number of this process' files, which no other live process has.

    A new process takes over the number and the files of a dead one, so that there are never
    more files than there were processes at the same time.
    """
    return _slot.get()


def forget_the_dead() -> None:
    """Remove the gauges of dead processes from the sums."""
    for file in _directory().glob("gauge_live*.db"):
        number = file.stem.rpartition("_")[2]
        if number.isdecimal() and (fd := _try_slot(int(number))) is not None:
            file.unlink(missing_ok=True)
            os.close(fd)


def _take_slot() -> int:
    # The descriptor, and with it the lock, stays open while the process lives.
    number = next(number for number in count() if _try_slot(number) is not None)
    for kind in _KINDS:
        file = _directory() / f"{kind}_{number}.db"
        # A dead process' gauges no longer hold; its counters go on.
        if kind.startswith("gauge_live") or not file.exists():
            _make_empty(file)
    return number


def _make_empty(file: Path) -> None:
    """Make a file without values in one step.

    prometheus_client would create it first and extend it then, and reading the metrics fails
    in between.
    """
    new = file.with_suffix(".new")
    with new.open("wb") as empty:
        empty.truncate(_FILE_SIZE)
    new.replace(file)


_slot = PerProcess(_take_slot)


def _try_slot(number: int) -> int | None:
    """Lock a number and return the descriptor that holds the lock, ``None`` if it is taken."""
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
        pass  # in use, or removed by another server
