"""gunicorn's master process, as ``tuswsgi serve`` runs it.

It gives gunicorn its settings and each worker its application, and it keeps a server alive
whose configuration was broken before a reload. What the settings are is ``server``'s.
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
    """The server.

    :param load: returns the configuration; called again at each reload (SIGHUP).
    :raises ConfigurationError: if the configuration is wrong.
    """

    def __init__(self, load: Callable[[], Config]) -> None:
        self._load = load
        self.config = load()
        self._settings = gunicorn_settings(self.config)
        super().__init__()

    def check(self) -> None:
        """Try what the workers will do, so that it fails here, once and in one sentence.

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
            # The error after which gunicorn gives up instead of trying with new workers.
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
