"""All groups of options, in the order of the reference.

The classes are imported by the function, so that ``tuswsgi --help`` does not import them.
"""

from __future__ import annotations


def option_groups() -> list[type]:
    """Return every class that declares options, in the order of the reference."""
    from tuswsgi.config.registry import DATA_STORES, INFO_STORES, LOCKERS, TRANSPORTS, with_options
    from tuswsgi.config.server import ServerSettings
    from tuswsgi.connections.pool import PoolSettings
    from tuswsgi.connections.redis import RedisSettings
    from tuswsgi.datastores.settings import DataStoreSettings
    from tuswsgi.hooks.settings import EnabledHooks, HookSettings
    from tuswsgi.infostores.settings import InfoStoreSettings
    from tuswsgi.lockers.settings import LockerSettings
    from tuswsgi.observing.sentry import SentrySettings
    from tuswsgi.outbox.settings import DeliverySettings
    from tuswsgi.protocol.cleanup import CleanUpSettings
    from tuswsgi.protocol.quota import QuotaSettings
    from tuswsgi.protocol.settings import UploadSettings
    from tuswsgi.web.settings import MonitoringSettings, WebSettings

    return [
        ServerSettings,
        DataStoreSettings,
        *with_options(DATA_STORES.values()),
        InfoStoreSettings,
        *with_options(INFO_STORES.values()),
        LockerSettings,
        *with_options(LOCKERS.values()),
        PoolSettings,
        RedisSettings,
        UploadSettings,
        QuotaSettings,
        WebSettings,
        MonitoringSettings,
        EnabledHooks,
        HookSettings,
        *with_options(TRANSPORTS),
        DeliverySettings,
        CleanUpSettings,
        SentrySettings,
    ]
