"""Signals for applications that want to hear of uploads without a hook transport.

They are Flask's own kind (blinker's). A receiver gets the ``Tus`` as sender and the
upload's ``info``, in the greenlet or thread of the request, after the change was saved::

    @upload_finished.connect
    def publish(tus, info):
        ...

A signal is sent once and lost with the process: what must not be lost is a hook's business.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace

from tuswsgi.core.info import FileInfo

log = logging.getLogger(__name__)

_signals = Namespace()

upload_created = _signals.signal("tuswsgi-upload-created")

#: Bytes have arrived: at most once a second while they do, and at the end of a request that
#: does not complete the upload. ``info.offset`` says how far it has come.
upload_progress = _signals.signal("tuswsgi-upload-progress")

#: The bytes are complete, and no hook refused the upload.
upload_finished = _signals.signal("tuswsgi-upload-finished")

#: The upload was removed: by a client, by the application or because it expired.
upload_terminated = _signals.signal("tuswsgi-upload-terminated")


def tell(signal: NamedSignal, sender: Any, info: FileInfo) -> None:
    """Send a signal. What a receiver raises is logged: the request has worked already."""
    if signal.receivers:
        try:
            signal.send(sender, info=info)
        except Exception:
            log.exception("A receiver of %s failed for %s", signal.name, info.id)
