"""What happens inside of a server, for whoever counts it (``metrics`` does).

These are signals like those of ``signals``, but about the server's work instead of uploads.
Whoever sends one asks first whether there are receivers: where nobody counts, that is all.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal, Namespace

log = logging.getLogger(__name__)

_signals = Namespace()

#: A request for uploads is answered with ``status``: ``method``, and ``code`` of a ``TusError``
#: or ``None``.
request_answered = _signals.signal("tuswsgi-request-answered")

#: ``size`` more bytes of bodies have come: about once a second while they do.
bytes_received = _signals.signal("tuswsgi-bytes-received")

#: A request let go of the upload that it was receiving, for another request.
upload_taken_over = _signals.signal("tuswsgi-upload-taken-over")

#: Somebody has waited ``seconds`` for a lock that another one held, and ``acquired`` it or not.
lock_waited = _signals.signal("tuswsgi-lock-waited")

#: A hook of this ``type`` was sent by ``transport`` in ``seconds``. The ``outcome`` is ``ok``,
#: ``refused`` (the answer of a blocking hook) or ``failed``.
hook_sent = _signals.signal("tuswsgi-hook-sent")

#: The clean-up has removed ``size`` bytes.
bytes_reclaimed = _signals.signal("tuswsgi-bytes-reclaimed")

#: The clean-up has moved a file to the quarantine, for no record tells of it (the ``action`` is
#: ``quarantined``), moved it to its place again (``put back``) or removed it (``discarded``).
quarantine_changed = _signals.signal("tuswsgi-quarantine-changed")


def report(signal: NamedSignal, sender: Any, **values: Any) -> None:
    """Send a signal. What a receiver raises is logged: counting must not fail the work."""
    try:
        signal.send(sender, **values)
    except Exception:
        log.exception("A receiver of %s failed", signal.name)
