"""Makes the configured backends, and derives settings that depend on several options.

The options are declared beside the code that they set, and ``registry`` names the classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuswsgi.config.loading import Config
from tuswsgi.config.registry import DATA_STORES, INFO_STORES, LOCKERS, TRANSPORTS
from tuswsgi.connections.databases import connect, is_server
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import RedisSettings
from tuswsgi.core.errors import ConfigurationError, TusError
from tuswsgi.core.options import MAIN
from tuswsgi.core.paths import why_unmakeable
from tuswsgi.datastores.base import DataStore
from tuswsgi.datastores.settings import DataStoreName, DataStoreSettings
from tuswsgi.hooks.base import Hook
from tuswsgi.hooks.payloads import payload_format
from tuswsgi.hooks.settings import EnabledHooks, HookSettings
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.settings import InfoStoreName, InfoStoreSettings
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.settings import LockerName, LockerSettings

if TYPE_CHECKING:
    from tuswsgi.connections.sql import SqlConnection

log = logging.getLogger(__name__)

#: The lockers that exclude the processes of one host only.
_LOCAL = (LockerName.FILE, LockerName.MEMORY)


class Backends:
    """The backends of a configuration. Each method makes a new one and opens nothing."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._data = config.build(DataStoreSettings)
        self._infos = config.build(InfoStoreSettings)
        self._locks = config.build(LockerSettings)

    @property
    def data_dir(self) -> Path:
        """The directory of uploads."""
        return self._data.data_dir

    @property
    def own_dir(self) -> Path:
        """The directory of everything that the server keeps besides uploads."""
        return self.data_dir / ".tuswsgi"

    @property
    def runtime_dir(self) -> Path:
        """The directory of this host's locks and sockets."""
        return self._locks.runtime_dir or self.own_dir

    @property
    def lock_dir(self) -> Path:
        """The directory of this host's locks."""
        return self.runtime_dir / "locks"

    @property
    def metrics_dir(self) -> Path:
        """The directory in which this host's workers sum up their metrics."""
        return self.runtime_dir / "metrics"

    @property
    def info_store_name(self) -> InfoStoreName:
        """The configured info store."""
        return self._infos.info_storage

    @property
    def locker_name(self) -> LockerName:
        """The configured locker, by default one that all servers with the same records share."""
        if self._locks.locker is not None:
            return self._locks.locker
        if not self.is_shared:
            return LockerName.FILE
        return LockerName.SQL if self.info_store_name is InfoStoreName.SQL else LockerName.REDIS

    @property
    def is_shared(self) -> bool:
        """Whether the records are on a server, which other hosts may use too."""
        if self.info_store_name is InfoStoreName.SQL:
            return is_server(self._database)
        return self.info_store_name is InfoStoreName.REDIS

    @property
    def in_memory(self) -> bool:
        """Whether a backend keeps its state in memory, so that there can be one process only."""
        return (
            self._data.storage is DataStoreName.MEMORY
            or self.info_store_name is InfoStoreName.MEMORY
            or self.locker_name is LockerName.MEMORY
        )

    def check_data_dir(self) -> None:
        """Check that the data directory exists: a command must not make an empty one.

        :raises ConfigurationError: if it does not.
        """
        if not self.data_dir.is_dir():
            raise ConfigurationError(
                f"[{MAIN}] data_dir = {self.data_dir}: There is no such directory."
            )

    def check_records(self) -> None:
        """Do ``check_data_dir`` if the records are in the data directory."""
        by_default = {InfoStoreName.SQL: "info_db_dsn", InfoStoreName.FILE: "info_dir"}
        option = by_default.get(self.info_store_name)
        if option is not None and self._config[option] is None:
            self.check_data_dir()

    def check_directories(self) -> None:
        """Check that the configured directories exist or can be made, without making them.

        :raises ConfigurationError: with one line for each directory that cannot be made.
        """
        directories = {"runtime_dir": self._locks.runtime_dir}
        if self._data.storage is DataStoreName.FILE:
            directories["data_dir"] = self.data_dir
        if self.info_store_name is InfoStoreName.FILE:
            directories["info_dir"] = self._config["info_dir"]
        problems = []
        for name, directory in directories.items():
            error = None if directory is None else why_unmakeable(directory)
            if error is not None:
                why = f"{error.strerror} ({error.filename})"
                problems.append(f"[{MAIN}] {name} = {directory}: It cannot be made: {why}.")
        if problems:
            raise ConfigurationError("\n".join(problems))

    def data_store(self) -> DataStore:
        """Return the data store."""
        store: DataStore = self._config.make(DATA_STORES[self._data.storage].load())
        return store

    def info_store(self) -> InfoStore:
        """Return the info store.

        :raises ConfigurationError: if its address is missing or wrong.
        """
        if self.info_store_name is InfoStoreName.SQL:
            return self._info_store(InfoStoreName.SQL, info_db_dsn=self._database)
        if self.info_store_name is InfoStoreName.REDIS:
            dsn = _redis(self._infos.info_db_dsn, "info_db_dsn")
            return self._info_store(InfoStoreName.REDIS, info_db_dsn=dsn)
        return self._info_store(self.info_store_name)

    def info_store_at(self, dsn: str) -> InfoStore:
        """Return the info store at an address.

        :param dsn: ``file:///directory``, or as ``info_db_dsn`` takes it.
        :raises ConfigurationError: if there is no such kind of store.
        """
        scheme = dsn.partition(":")[0]
        if scheme == "file":
            return self._info_store(InfoStoreName.FILE, info_dir=directory_of(dsn))
        if scheme == "unix" or scheme.startswith("redis"):
            return self._info_store(InfoStoreName.REDIS, info_db_dsn=dsn)
        return self._info_store(InfoStoreName.SQL, info_db_dsn=dsn)

    def _info_store(self, name: InfoStoreName, **values: Any) -> InfoStore:
        values = {"info_dir": self._config["info_dir"] or self.own_dir / "info", **values}
        store: InfoStore = self._config.make(INFO_STORES[name].load(), **self._shared, **values)
        return store

    def locker(self) -> Locker[Any]:
        """Return the locker. One on a server takes the file lock of this host as well.

        :raises ConfigurationError: if its address is missing or wrong.
        """
        name = self.locker_name
        if name in _LOCAL:
            return self._locker(name)
        values: dict[str, Any] = {"host_locker": self._locker(LockerName.FILE)}
        if name is LockerName.REDIS:
            dsn = self._locks.locker_dsn or self._infos.info_db_dsn
            values["locker_dsn"] = _redis(dsn, "locker_dsn")
        elif name is LockerName.SQL:
            values["locker_dsn"] = self._locks.locker_dsn or self._database
        return self._locker(name, **values)

    def _locker(self, name: LockerName, **values: Any) -> Locker[Any]:
        locker: Locker[Any] = self._config.make(
            LOCKERS[name].load(), directory=self.lock_dir, **self._shared, **values
        )
        return locker

    @property
    def _database(self) -> str:
        return self._infos.info_db_dsn or f"sqlite:///{self.own_dir.absolute()}/info.sqlite3"

    @property
    def _shared(self) -> dict[str, Any]:
        """The settings of connections, for backends that take them."""
        return {
            "pool": self._config.build(PoolSettings),
            "settings": self._config.build(RedisSettings),
        }

    def databases(self) -> Sequence[SqlConnection]:
        """Return the SQL databases that the backends use."""
        dsns = []
        if self.info_store_name is InfoStoreName.SQL:
            dsns.append(self._database)
        if self.locker_name is LockerName.SQL:
            dsns.append(self._locks.locker_dsn or self._database)
        pool = self._config.build(PoolSettings)
        fsync = self._data.force_fsync
        return [connect(dsn, force_fsync=fsync, pool=pool) for dsn in dict.fromkeys(dsns)]

    def hooks(self) -> list[Hook]:
        """Return the transports of hooks that are switched on, in the order of the registry."""
        types = frozenset(self._config.build(EnabledHooks).hooks)
        format = payload_format(self._config.build(HookSettings).format)
        hooks: list[Hook] = []
        for transport in TRANSPORTS:
            kind = transport.load()
            options = self._config.values(kind)
            if any(options[switch] for switch in transport.switches):
                hook: Hook = kind(format=format, **options)
                hook.types = types
                hooks.append(hook)
        return hooks

    def prepare(self) -> None:
        """Prepare all backends as the workers will, and close them.

        A backend that cannot be reached is logged only: it may come back, and the workers wait
        for it.

        :raises ConfigurationError: if a backend cannot work as it is configured.
        """
        backends: list[DataStore | InfoStore | Locker[Any] | Hook]
        backends = [self.data_store(), self.info_store(), self.locker(), *self.hooks()]
        for backend in backends:
            try:
                backend.prepare()
            except TusError as error:
                name = type(backend).__name__
                why = error.__cause__ or "see above"
                log.error(
                    "The %s is not available (%s): uploads are refused until it is", name, why
                )
            finally:
                backend.close()
        if self.is_shared and self.locker_name in _LOCAL:
            log.warning(
                "The records are on a server, but the locks are local (`locker = %s`): uploads are "
                "safe only while one host serves them",
                self.locker_name.value,
            )


def directory_of(dsn: str) -> Path:
    """Return the directory that is written as ``file:///directory``.

    :raises ConfigurationError: if it is written in another way.
    """
    path = Path(dsn.removeprefix("file://"))
    if not path.is_absolute():
        raise ConfigurationError("The DSN of a directory has to look like file:///directory.")
    return path


def _redis(dsn: str | None, option: str) -> str:
    if dsn is None:
        raise ConfigurationError(
            f"[{MAIN}] {option}: The address of Redis is missing, e.g. redis://127.0.0.1:6379."
        )
    return dsn
