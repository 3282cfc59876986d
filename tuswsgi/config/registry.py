"""The backends by the names that the configuration gives them.

This file owns which backends there are and how they are made of the configuration. It knows
nothing of how a backend works. Backends are imported where they are made, so that only those in
use need their libraries.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuswsgi.config.backends import Backends, DataStoreName, InfoStoreName, LockerName
from tuswsgi.config.groups import transports
from tuswsgi.config.loading import Config
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import RedisSettings
from tuswsgi.core.errors import ConfigurationError, TusError
from tuswsgi.core.options import MAIN
from tuswsgi.datastores.base import DataStore
from tuswsgi.hooks.base import Hook
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Locker

if TYPE_CHECKING:
    from tuswsgi.connections.sql import SqlConnection

log = logging.getLogger(__name__)


def data_store(config: Config) -> DataStore:
    """Return the configured data store; nothing is opened yet."""
    backends = config.build(Backends)
    if backends.storage is DataStoreName.MEMORY:
        from tuswsgi.datastores.memory import MemoryDataStore

        return MemoryDataStore()
    from tuswsgi.datastores.file import FileDataStore

    return FileDataStore(
        data_dir=backends.data_dir,
        force_fsync=backends.force_fsync,
        **config.values(FileDataStore),
    )


def limited(config: Config, store: DataStore, infos: InfoStore, locker: Locker[Any]) -> DataStore:
    """Return a data store with the configured limit in front, itself if there is none."""
    from tuswsgi.datastores.limited import LimitedDataStore

    values = config.values(LimitedDataStore)
    if values["max_total_size"] is None:
        return store
    return LimitedDataStore(store, infos, locker, **values)


def info_store(config: Config) -> InfoStore:
    """Return the configured info store; nothing is opened yet."""
    backends = config.build(Backends)
    if backends.info_storage is InfoStoreName.MEMORY:
        from tuswsgi.infostores.memory import MemoryInfoStore

        return MemoryInfoStore()
    if backends.info_storage is InfoStoreName.FILE:
        from tuswsgi.infostores.file import FileInfoStore

        directory = config.values(FileInfoStore)["info_dir"] or backends.own_dir / "info"
        return _file_info_store(directory, config)
    if backends.info_storage is InfoStoreName.REDIS:
        return _redis_info_store(_named(backends.info_db_dsn, "info_db_dsn"), config)
    return _sql_info_store(backends.database, config)


def info_store_at(dsn: str, config: Config) -> InfoStore:
    """Return the info store of a DSN; nothing is opened yet.

    :param dsn: ``file:///directory``, or as ``info_db_dsn`` takes it.
    :raises ConfigurationError: if there is no such kind of store.
    """
    scheme = dsn.partition(":")[0]
    if scheme == "file":
        return _file_info_store(directory_of(dsn), config)
    if scheme == "unix" or scheme.startswith("redis"):
        return _redis_info_store(dsn, config)
    return _sql_info_store(dsn, config)


def directory_of(dsn: str) -> Path:
    """Return the directory that is written as ``file:///directory``.

    :raises ConfigurationError: if it is written in another way.
    """
    path = Path(dsn.removeprefix("file://"))
    if not path.is_absolute():
        raise ConfigurationError("The directory of records is not written as file:///directory.")
    return path


def _file_info_store(directory: Path, config: Config) -> InfoStore:
    from tuswsgi.infostores.file import FileInfoStore

    values = {**config.values(FileInfoStore), "info_dir": directory}
    return FileInfoStore(**values, force_fsync=config.build(Backends).force_fsync)


def _redis_info_store(dsn: str, config: Config) -> InfoStore:
    from tuswsgi.infostores.redis import RedisInfoStore

    return RedisInfoStore(
        dsn,
        **config.values(RedisInfoStore),
        pool=config.build(PoolSettings),
        settings=config.build(RedisSettings),
    )


def _sql_info_store(dsn: str, config: Config) -> InfoStore:
    from tuswsgi.infostores.sql import SqlInfoStore

    force_fsync = config.build(Backends).force_fsync
    return SqlInfoStore(dsn, force_fsync=force_fsync, pool=config.build(PoolSettings))


def locker(config: Config) -> Locker[Any]:
    """Return the configured locker; nothing is opened yet."""
    backends = config.build(Backends)
    if backends.locker is LockerName.MEMORY:
        from tuswsgi.lockers.memory import MemoryLocker

        return MemoryLocker(timeout=backends.lock_timeout)
    from tuswsgi.lockers.file import FileLocker

    of_host = FileLocker(directory=backends.lock_dir, timeout=backends.lock_timeout)
    if backends.chosen_locker is LockerName.FILE:
        return of_host
    return _lease_locker(config, backends, of_host)


def _lease_locker(config: Config, backends: Backends, beside: Locker[Any]) -> Locker[Any]:
    """Return a locker on a server, with the locks of this host beside."""
    common: dict[str, Any] = {
        "timeout": backends.lock_timeout,
        "lease": backends.lock_lease,
        "beside": beside,
        "pool": config.build(PoolSettings),
    }
    if backends.chosen_locker is LockerName.REDIS:
        from tuswsgi.lockers.redis import RedisLocker

        settings = config.build(RedisSettings)
        dsn = _named(backends.locker_dsn or backends.info_db_dsn, "locker_dsn")
        return RedisLocker(dsn, **common, settings=settings)
    if backends.chosen_locker is LockerName.SQL:
        from tuswsgi.lockers.sql import SqlLocker

        # As the info store has it, to share its connections.
        dsn = backends.locker_dsn or backends.database
        return SqlLocker(dsn, **common, durable=backends.force_fsync)
    if backends.locker is LockerName.CONSUL:
        from tuswsgi.lockers.consul import ConsulLocker

        return ConsulLocker(**_given(dsn=backends.locker_dsn), **common)
    from tuswsgi.lockers.etcd import EtcdLocker

    return EtcdLocker(**_given(dsn=backends.locker_dsn), **common)


def databases(config: Config) -> list[SqlConnection]:
    """Return the SQL databases that the configured backends use; nothing is opened yet."""
    from tuswsgi.connections.databases import connect

    backends = config.build(Backends)
    dsns = []
    if backends.info_storage is InfoStoreName.SQL:
        dsns.append(backends.database)
    if backends.chosen_locker is LockerName.SQL:
        dsns.append(backends.locker_dsn or backends.database)
    pool = config.build(PoolSettings)
    durable = backends.force_fsync
    return [connect(dsn, durable=durable, pool=pool) for dsn in dict.fromkeys(dsns)]


def hooks(config: Config) -> list[Hook]:
    """Return the configured transports of hooks, in the order in which they are asked."""
    from tuswsgi.hooks.payloads import payload_format
    from tuswsgi.hooks.settings import EnabledHooks, HookSettings

    made: list[Hook] = []
    for transport, ways in transports():
        values = config.values(transport)
        if any(values[way] for way in ways):
            format = payload_format(config.build(HookSettings).format)
            hook: Hook = transport(format=format, **values)
            hook.types = frozenset(config.build(EnabledHooks).hooks)
            made.append(hook)
    return made


def prepare(config: Config) -> None:
    """Make the configured backends ready for use, as the workers will, and let them go.

    One that is away may come back: the workers wait for it.

    :raises ConfigurationError: if one of them cannot be used as it is configured.
    """
    backends: list[DataStore | InfoStore | Locker[Any] | Hook]
    backends = [data_store(config), info_store(config), locker(config), *hooks(config)]
    for backend in backends:
        try:
            backend.prepare()
        except TusError as error:
            name = type(backend).__name__
            why = error.__cause__ or "see above"
            log.error(
                "The %s cannot be used yet (%s): no uploads are taken until it can", name, why
            )
        finally:
            backend.close()
    _warn_of_locks(config.build(Backends))


def _warn_of_locks(backends: Backends) -> None:
    if backends.is_shared and backends.chosen_locker in (LockerName.FILE, LockerName.MEMORY):
        log.warning(
            "The records are on a server and the locks are not (`locker = %s`): uploads are safe "
            "only while one host serves them",
            backends.chosen_locker.value,
        )


def _named(dsn: str | None, option: str) -> str:
    if dsn is None:
        raise ConfigurationError(
            f"[{MAIN}] {option}: Redis is to be used, and its address is missing, "
            "e.g. redis://127.0.0.1:6379."
        )
    return dsn


def _given(**values: Any) -> dict[str, Any]:
    """Return those of `values` that are set."""
    return {key: value for key, value in values.items() if value is not None}
