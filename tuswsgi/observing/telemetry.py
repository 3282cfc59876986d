"""Signals about the server's own work, which ``metrics`` counts.

Senders check ``receivers`` first, so that they cost nothing where metrics are switched off.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace

log = logging.getLogger(__name__)

_signals = Namespace()

#: A request was answered: its ``method``, the ``status``, and the ``code`` of a ``TusError`` or
#: ``None``.
request_answered = _signals.signal("tuswsgi-request-answered")

#: ``size`` more bytes of bodies were received; sent about once a second.
bytes_received = _signals.signal("tuswsgi-bytes-received")

#: A request released the upload that it was receiving, for another request.
upload_taken_over = _signals.signal("tuswsgi-upload-taken-over")

#: A request waited ``seconds`` for a lock, and has ``acquired`` it or not.
lock_waited = _signals.signal("tuswsgi-lock-waited")

#: A hook of ``type`` was sent by ``transport`` in ``seconds``. The ``outcome`` is ``ok``,
#: ``refused`` (by a blocking hook) or ``failed``.
hook_sent = _signals.signal("tuswsgi-hook-sent")

#: The clean-up removed ``size`` bytes.
bytes_reclaimed = _signals.signal("tuswsgi-bytes-reclaimed")

#: The clean-up moved a file without a record to the quarantine (the ``action`` is
#: ``quarantined``), moved it back (``put back``) or removed it from there (``discarded``).
quarantine_changed = _signals.signal("tuswsgi-quarantine-changed")


def report(signal: NamedSignal, sender: Any, **values: Any) -> None:
    """Send a signal. Exceptions of receivers are logged: metrics must not fail a request."""
    try:
        signal.send(sender, **values)
    except Exception:
        log.exception("A receiver of %s failed", signal.name)
