"""Everything that has options, in the order of the reference.

The classes are imported when somebody asks, so that ``--help`` of one command does not load all.
"""

from __future__ import annotations


def option_groups() -> list[type]:
    """Return every class that has options, in the order of the reference."""
    from tuswsgi.config.backends import Backends
    from tuswsgi.config.server import ServerSettings
    from tuswsgi.connections.pool import PoolSettings
    from tuswsgi.connections.redis import RedisSettings
    from tuswsgi.datastores.file import FileDataStore
    from tuswsgi.datastores.limited import LimitedDataStore
    from tuswsgi.hooks.settings import EnabledHooks, HookSettings
    from tuswsgi.infostores.file import FileInfoStore
    from tuswsgi.infostores.redis import RedisInfoStore
    from tuswsgi.observing.sentry import SentrySettings
    from tuswsgi.outbox.delivery import DeliverySettings
    from tuswsgi.protocol.settings import CleanUpSettings, UploadSettings
    from tuswsgi.web.settings import MonitoringSettings, WebSettings

    return [
        ServerSettings,
        Backends,
        FileDataStore,
        LimitedDataStore,
        FileInfoStore,
        RedisInfoStore,
        PoolSettings,
        RedisSettings,
        UploadSettings,
        WebSettings,
        MonitoringSettings,
        EnabledHooks,
        HookSettings,
        *(transport for transport, _ in transports()),
        DeliverySettings,
        CleanUpSettings,
        SentrySettings,
    ]


def transports() -> list[tuple[type, tuple[str, ...]]]:
    """Return the transports of hooks in their order, with the options that switch them on."""
    from tuswsgi.hooks.amqp import AmqpHook
    from tuswsgi.hooks.file import FileHook
    from tuswsgi.hooks.grpc import GrpcHook
    from tuswsgi.hooks.http import HttpHook

    return [
        (FileHook, ("file", "dir")),
        (HttpHook, ("urls",)),
        (GrpcHook, ("endpoint",)),
        (AmqpHook, ("url",)),
    ]
