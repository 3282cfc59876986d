"""tuswsgi: a server for tus, the protocol of resumable uploads, in a Flask blueprint.

Public names:

- Tus: a server that lives in a Flask application
- create_app: makes an application that is nothing but a tus server
- request_method: the method of a request, also if the client overrides it
- upload_created, upload_progress, upload_finished, upload_terminated: signals
- HookRequest, HookResponse, ChangeFileInfo: what hook functions get and return
- HookType: the hooks
- FileInfo, Metadata: an upload as its record has it
- DataStore, InfoStore, Locker: base classes for backends of your own
- TusError, ConfigurationError: base classes of errors
- __version__: the version of the installed distribution

They are imported at their first use, so that the command line starts quickly and only what is
used is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from tuswsgi.app import Tus as Tus
    from tuswsgi.app import create_app as create_app
    from tuswsgi.core.errors import ConfigurationError as ConfigurationError
    from tuswsgi.core.errors import TusError as TusError
    from tuswsgi.core.events import HookType as HookType
    from tuswsgi.core.info import FileInfo as FileInfo
    from tuswsgi.core.info import Metadata as Metadata
    from tuswsgi.datastores.base import DataStore as DataStore
    from tuswsgi.hooks.base import ChangeFileInfo as ChangeFileInfo
    from tuswsgi.hooks.base import HookRequest as HookRequest
    from tuswsgi.hooks.base import HookResponse as HookResponse
    from tuswsgi.infostores.base import InfoStore as InfoStore
    from tuswsgi.lockers.base import Locker as Locker
    from tuswsgi.observing.signals import upload_created as upload_created
    from tuswsgi.observing.signals import upload_finished as upload_finished
    from tuswsgi.observing.signals import upload_progress as upload_progress
    from tuswsgi.observing.signals import upload_terminated as upload_terminated
    from tuswsgi.web.blueprint import request_method as request_method

_HOMES = {
    "ChangeFileInfo": "hooks.base",
    "ConfigurationError": "core.errors",
    "DataStore": "datastores.base",
    "FileInfo": "core.info",
    "HookRequest": "hooks.base",
    "HookResponse": "hooks.base",
    "HookType": "core.events",
    "InfoStore": "infostores.base",
    "Locker": "lockers.base",
    "Metadata": "core.info",
    "Tus": "app",
    "TusError": "core.errors",
    "create_app": "app",
    "request_method": "web.blueprint",
    "upload_created": "observing.signals",
    "upload_finished": "observing.signals",
    "upload_progress": "observing.signals",
    "upload_terminated": "observing.signals",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tuswsgi.core.version import installed_version

        return installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
