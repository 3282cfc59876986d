"""gunicorn's master process, as ``tuswsgi serve`` runs it.

It passes the settings to gunicorn and the application to each worker. A reload with a broken
configuration leaves the server running with the previous one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.errors import AppImportError

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.config.server import ServerSettings
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.serving.settings import check_listening, gunicorn_settings, set_up_logging

logger = logging.getLogger(__name__)


class Master(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """The server's gunicorn application.

    :param load: returns the configuration; called again at each reload (SIGHUP).
    :raises ConfigurationError: if the configuration is wrong.
    """

    def __init__(self, load: Callable[[], Config]) -> None:
        self._load = load
        self.config = load()
        self._settings = gunicorn_settings(self.config)
        super().__init__()

    def check(self) -> None:
        """Check what the workers need, so that problems are reported once and briefly.

        :raises ConfigurationError: if the server cannot start on this host.
        """
        set_up_logging(self.config.build(ServerSettings))
        Backends(self.config).prepare()
        if not _inherits_sockets():
            check_listening(self.config.build(ServerSettings))

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        from tuswsgi.serving.dispatch import application

        try:
            return application(self.config)
        except ConfigurationError as error:
            # With this error gunicorn gives up instead of starting more workers.
            raise AppImportError(str(error)) from error

    def reload(self) -> None:
        try:
            config = self._load()
            settings = gunicorn_settings(config)
        except ConfigurationError as error:
            logger.error("The configuration is wrong; the server goes on as before.\n%s", error)
            return
        self.config = config
        self._settings = settings
        super().reload()


def _inherits_sockets() -> bool:
    """Whether this process replaces an older gunicorn (SIGUSR2), or systemd listens for it."""
    return "GUNICORN_FD" in os.environ or os.environ.get("LISTEN_PID") == str(os.getpid())
