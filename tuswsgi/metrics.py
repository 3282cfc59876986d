"""Metrics for Prometheus.

Each process counts what happens. If ``PROMETHEUS_MULTIPROC_DIR`` names a directory, the counts
of all processes are added up there (``metrics_directory``). The numbers of uploads and events,
and the free space, are read from the stores at each request for metrics, so that they cannot
drift.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores.base import Census
from tuswsgi.observing import signals, telemetry
from tuswsgi.observing.cached_check import Probe
from tuswsgi.observing.metrics_directory import (
    DIRECTORY_VARIABLE,
    check_installed,
    forget_the_dead,
    slot,
    use_slots,
)
from tuswsgi.protocol.uploads import Uploads

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily, Metric

log = logging.getLogger(__name__)

#: Seconds without a byte after which an unfinished upload is stalled. While bytes arrive, its
#: record is saved at least every ten minutes.
_STALLED = 3600.0

#: How long to read from the stores may take, and how long the result is valid, in seconds.
_TIMEOUT = 8.0
_FRESH = 5.0

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST")

#: Clients can send any name of a method; these are counted as one.
_OTHER_METHOD = "other"

_SECONDS = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The metrics of one server. All servers of a process share the counters.

    :param start: starts the server in this process, as its first request does.
    :raises ConfigurationError: if a library is missing.
    """

    def __init__(self, uploads: Uploads, start: Callable[[], None]) -> None:
        check_installed()
        self._counters = _counters()
        self._uploads = uploads
        self._start = start
        self._census = Probe(self._look_into_infos, _TIMEOUT, _FRESH)
        self._free = Probe(uploads.data.free_space, _TIMEOUT, _FRESH)

    def set_open_connections(self, number: int) -> None:
        """Set how many connections this process has."""
        self._counters.connections.set(number)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics as text, and its content type.

        :param accept: the ``Accept`` header of the request.
        """
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
        from prometheus_client.multiprocess import MultiProcessCollector

        if use_slots():
            forget_the_dead()
        registry = CollectorRegistry()
        if DIRECTORY_VARIABLE in os.environ:
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        else:
            registry.register(self._counters.registry)
        registry.register(self)
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics from the stores; Prometheus' library calls this. Those of a store that
        fails are left out.
        """
        census = self._seen(self._census)
        free = self._seen(self._free)
        if census is not None:
            yield _gauge("uploads_in_progress", "Unfinished uploads.", census.unfinished)
            text = "Unfinished uploads without a byte for an hour."
            yield _gauge("uploads_stalled", text, census.stalled)
            yield _gauge("outbox_events", "Post-hooks to be delivered.", census.pending)
            oldest = 0.0 if census.oldest is None else max(0.0, time.time() - census.oldest)
            yield _gauge("outbox_oldest_seconds", "Age of the oldest one of them.", oldest)
            text = "Post-hooks that were given up (dead letters)."
            yield _gauge("outbox_dead_events", text, census.dead)
        if free is not None:
            yield _gauge("disk_free_bytes", "Free space of the data store.", free)

    def _seen(self, probe: Probe[Any]) -> Any:
        try:
            return probe.get()
        except Exception as error:
            log.warning("A part of the metrics is missing: %r", error)
            return None

    def _look_into_infos(self) -> Census:
        self._start()
        return self._uploads.infos.census(stalled_before=time.time() - _STALLED)


class _Counters:
    """The counters of a process, and the signals that increment them."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tuswsgi_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"tuswsgi_{name}", text, labels, registry=registry, buckets=_SECONDS)

        requests = counter("requests", "Requests for uploads that were answered.", "method")
        # To find a child takes longer than to increment it.
        self._requests = {name: requests.labels(name) for name in (*_METHODS, _OTHER_METHOD)}
        self._errors = counter("errors", "Requests that failed.", "status", "code")
        self._received = counter("received_bytes", "Bytes of uploads that were received.")
        self._created = counter("uploads_created", "Uploads that were created.")
        self._finished = counter("uploads_finished", "Uploads that were finished.")
        text = "Uploads that clients, hooks or the application removed."
        self._terminated = counter("uploads_terminated", text)
        self._expired = counter("uploads_expired", "Uploads that expired.")
        text = "Requests that were interrupted by another one for the same upload."
        self._takeovers = counter("takeovers", text)
        text = "Waits for the lock of an upload that another request held."
        waits = histogram("lock_wait_seconds", text, "outcome")
        self._waits = {True: waits.labels("acquired"), False: waits.labels("given up")}
        self._hooks = histogram("hook_seconds", "Hooks that were sent.", "transport", "type")
        text = "Hooks that failed, or whose answer was invalid."
        self._hook_errors = counter("hook_errors", text, "transport", "type")
        self._reclaimed = counter("reclaimed_bytes", "Bytes that the clean-up has removed.")
        text = "Files without a record that the clean-up moved, restored or deleted."
        moves = counter("quarantine_files", text, "action")
        actions = ("quarantined", "put back", "discarded")
        self._moves = {action: moves.labels(action) for action in actions}
        self.connections = Gauge(
            "tuswsgi_open_connections",
            "Connections of clients.",
            registry=registry,
            multiprocess_mode="livesum",
        )

    def connect(self) -> None:
        """Begin to count."""
        telemetry.request_answered.connect(self._on_answer)
        telemetry.bytes_received.connect(self._on_bytes)
        telemetry.upload_taken_over.connect(self._on_takeover)
        telemetry.lock_waited.connect(self._on_wait)
        telemetry.hook_sent.connect(self._on_hook)
        telemetry.bytes_reclaimed.connect(self._on_reclaimed)
        telemetry.quarantine_changed.connect(self._on_move)
        signals.upload_created.connect(self._on_created)
        signals.upload_finished.connect(self._on_finished)
        signals.upload_terminated.connect(self._on_terminated)

    def _on_answer(self, sender: object, method: str, status: int, code: str | None) -> None:
        (self._requests.get(method) or self._requests[_OTHER_METHOD]).inc()
        if code is not None:
            self._errors.labels(str(status), code).inc()

    def _on_bytes(self, sender: object, size: int) -> None:
        self._received.inc(size)

    def _on_takeover(self, sender: object) -> None:
        self._takeovers.inc()

    def _on_wait(self, sender: object, seconds: float, acquired: bool) -> None:
        self._waits[acquired].observe(seconds)

    def _on_hook(
        self, sender: object, transport: str, type: object, seconds: float, outcome: str
    ) -> None:
        self._hooks.labels(transport, str(type)).observe(seconds)
        if outcome == "failed":
            self._hook_errors.labels(transport, str(type)).inc()

    def _on_reclaimed(self, sender: object, size: int) -> None:
        self._reclaimed.inc(size)

    def _on_move(self, sender: object, action: str) -> None:
        self._moves[action].inc()

    def _on_created(self, sender: object, info: FileInfo) -> None:
        self._created.inc()

    def _on_finished(self, sender: object, info: FileInfo) -> None:
        self._finished.inc()

    def _on_terminated(self, sender: object, info: FileInfo) -> None:
        (self._expired if info.state is State.EXPIRED else self._terminated).inc()


@cache
def _counters() -> _Counters:
    """Return the only counters of this process: two would overwrite each other's numbers."""
    if use_slots():
        from prometheus_client import values

        values.ValueClass = values.MultiProcessValue(slot)  # type: ignore[no-untyped-call]
    counters = _Counters()
    counters.connect()
    return counters


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"tuswsgi_{name}", text, value=value)
