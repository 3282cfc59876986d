"""The backends and the transports of hooks: the name of each one, and where its class is.

A class is imported when it is chosen, so that a server needs only the libraries that it uses.
To add a backend, add its name to the ``settings`` of its package and a line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tuswsgi.datastores.settings import DataStoreName
from tuswsgi.infostores.settings import InfoStoreName
from tuswsgi.lockers.settings import LockerName


@dataclass(frozen=True)
class Backend:
    """Where the class of a backend is.

    :param path: the module and the class.
    :param has_options: whether the class declares options of its own. ``--help`` imports it
        then, so its module must not import libraries that are slow or optional.
    """

    path: str
    has_options: bool = False

    def load(self) -> Any:
        """Import the class and return it."""
        module, _, name = self.path.rpartition(".")
        return getattr(import_module(module), name)


@dataclass(frozen=True)
class Transport(Backend):
    """Where the class of a transport of hooks is.

    :param switches: the options that switch it on, each by itself.
    """

    has_options: bool = True
    switches: tuple[str, ...] = ()


DATA_STORES: Mapping[DataStoreName, Backend] = {
    DataStoreName.FILE: Backend("tuswsgi.datastores.file.FileDataStore", has_options=True),
    DataStoreName.MEMORY: Backend("tuswsgi.datastores.memory.MemoryDataStore"),
}

INFO_STORES: Mapping[InfoStoreName, Backend] = {
    InfoStoreName.SQL: Backend("tuswsgi.infostores.sql.SqlInfoStore"),
    InfoStoreName.REDIS: Backend("tuswsgi.infostores.redis.RedisInfoStore", has_options=True),
    InfoStoreName.FILE: Backend("tuswsgi.infostores.file.FileInfoStore", has_options=True),
    InfoStoreName.MEMORY: Backend("tuswsgi.infostores.memory.MemoryInfoStore"),
}

LOCKERS: Mapping[LockerName, Backend] = {
    LockerName.FILE: Backend("tuswsgi.lockers.file.FileLocker"),
    LockerName.MEMORY: Backend("tuswsgi.lockers.memory.MemoryLocker"),
    LockerName.REDIS: Backend("tuswsgi.lockers.redis.RedisLocker"),
    LockerName.SQL: Backend("tuswsgi.lockers.sql.SqlLocker"),
    LockerName.ETCD: Backend("tuswsgi.lockers.etcd.EtcdLocker"),
    LockerName.CONSUL: Backend("tuswsgi.lockers.consul.ConsulLocker"),
}

#: Blocking hooks are sent in this order.
TRANSPORTS = (
    Transport("tuswsgi.hooks.file.FileHook", switches=("file", "dir")),
    Transport("tuswsgi.hooks.http.HttpHook", switches=("urls",)),
    Transport("tuswsgi.hooks.grpc.GrpcHook", switches=("endpoint",)),
    Transport("tuswsgi.hooks.amqp.AmqpHook", switches=("url",)),
)


def with_options(backends: Iterable[Backend]) -> list[type]:
    """Return the classes of those backends that declare options."""
    return [backend.load() for backend in backends if backend.has_options]
