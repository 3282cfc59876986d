"""Tells commands which runtime directory the servers of a data directory use.

A command that looked for locks in a different directory from the servers' would find every upload
unlocked. So each server registers its runtime directory in the data directory, in a file that
it keeps locked while it runs. Only locks in files need this.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import MAIN
from tuswsgi.core.paths import adopt, make_directory
from tuswsgi.core.process import run_in_thread
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.settings import LockerName

log = logging.getLogger(__name__)

#: Seconds after which an unused registration is removed. The scope of a directory changes with each
#: boot of the host, so each boot makes a new one.
_OLD = 30 * 86_400.0


class RuntimeDir(NamedTuple):
    """A registered runtime directory.

    :param file: the registration.
    :param scope: identifies the directory, whatever path a process sees it under.
    :param since: when the last server registered it, as Unix time.
    """

    file: Path
    path: Path
    scope: str
    since: float
    is_in_use: bool


class Registration:
    """The registration of this process; it lasts as long as this object."""

    def __init__(self, config: Config) -> None:
        backends = Backends(config)
        scope = _scope(config)
        directory = _registrations(backends)
        path = backends.runtime_dir.absolute()
        make_directory(directory)
        for registered in _registered(directory):
            if not registered.is_in_use and registered.since < time.time() - _OLD:
                registered.file.unlink(missing_ok=True)
            elif registered.is_in_use and registered.scope != scope:
                log.error(
                    "Another server on %s has its locks in %s, and this one in %s: both can write "
                    "an upload at the same time. Set the same runtime_dir for both",
                    backends.data_dir,
                    registered.path,
                    path,
                )
        name = hashlib.blake2b(f"{path}\n{scope}".encode(), digest_size=8).hexdigest()
        self._fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        adopt(self._fd, directory)
        # A command may be testing the lock at this moment.
        run_in_thread(fcntl.flock, self._fd, fcntl.LOCK_SH)
        os.pwrite(self._fd, f"{path}\n{scope}\n".encode(), 0)
        os.utime(self._fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def uses_registration(config: Config) -> bool:
    """Whether servers with this configuration register their runtime directory."""
    backends = Backends(config)
    return backends.locker_name is LockerName.FILE and not backends.in_memory


def with_runtime_dir_of_servers(config: Config) -> Config:
    """Return the configuration of a command with the runtime directory of the servers.

    :raises ConfigurationError: if the configuration names another one, or if that of the servers
        cannot be reached from here.
    """
    if not uses_registration(config):
        return config
    backends = Backends(config)
    try:
        registered = sorted(_registered(_registrations(backends)), key=lambda one: one.since)
    except OSError as error:
        raise ConfigurationError(
            f"The runtime directories of the servers cannot be read: {error}"
        ) from error
    if config["runtime_dir"] is None and registered:
        # If no server runs now, the next one most likely uses the directory of the last one.
        last = next((one for one in registered if one.is_in_use), registered[-1])
        config = _using(config, last.path, backends)
    scope = _scope(config)
    for one in registered:
        if one.is_in_use and one.scope != scope:
            here = Backends(config).runtime_dir.absolute()
            raise ConfigurationError(_refusal(backends.data_dir, one.path, here))
    return config


def _using(config: Config, path: Path, backends: Backends) -> Config:
    if not path.is_dir():
        try:
            make_directory(path)
            adopt(path, backends.own_dir)
        except OSError:
            return config
    return config.replace("runtime_dir", path, str(_registrations(backends)))


def _refusal(data_dir: Path, path: Path, here: Path) -> str:
    where = (
        f"which is another directory here: run this where the server runs, or set [{MAIN}] "
        "runtime_dir to the same one."
        if path == here
        else f"not {here}: add --runtime-dir {path}."
    )
    return f"A server on {data_dir} has its locks in the runtime directory {path}, {where}"


def _scope(config: Config) -> str:
    directory = Backends(config).lock_dir
    return FileLocker(directory).scope or str(directory.absolute())


def _registrations(backends: Backends) -> Path:
    return backends.own_dir / "runtime"


def _registered(directory: Path) -> Iterator[RuntimeDir]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for name in names:
        try:
            with open(directory / name, encoding="utf-8") as file:
                path, _, scope = file.read().strip().partition("\n")
                since = os.fstat(file.fileno()).st_mtime
                is_in_use = _is_locked(file.fileno())
        except FileNotFoundError:
            continue  # removed a moment ago
        if scope:  # else its server has not written it yet, or was killed before
            yield RuntimeDir(directory / name, Path(path), scope, since, is_in_use)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
