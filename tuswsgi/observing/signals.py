"""Signals that tell an application about uploads, as Flask's signals (blinker).

A receiver gets the ``Tus`` as sender and the upload's ``info``, in the greenlet or thread of
the request, after the change was saved::

    from tuswsgi import upload_finished

    @upload_finished.connect
    def publish(tus, info):
        ...

A signal is sent at most once: it is lost if the process dies. Use a hook for events that must
not be lost.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace

from tuswsgi.core.info import FileInfo

log = logging.getLogger(__name__)

_signals = Namespace()

upload_created = _signals.signal("tuswsgi-upload-created")

#: Sent at most once a second while bytes arrive, and at the end of a request that does not
#: complete the upload. ``info.offset`` is the number of bytes received.
upload_progress = _signals.signal("tuswsgi-upload-progress")

#: The upload is complete, and no hook refused it.
upload_finished = _signals.signal("tuswsgi-upload-finished")

#: The upload was removed by a client, by the application or by the clean-up.
upload_terminated = _signals.signal("tuswsgi-upload-terminated")


def tell(signal: NamedSignal, sender: Any, info: FileInfo) -> None:
    """Send a signal. Exceptions of receivers are logged: the request itself has succeeded."""
    if signal.receivers:
        try:
            signal.send(sender, info=info)
        except Exception:
            log.exception("A receiver of %s failed for %s", signal.name, info.id)
