"""A pool of connections to an AMQP broker, one thread (greenlet) for each.

This file owns how many connections there are, how long publishers wait and what happens while
the broker is unavailable. ``connections.amqp_connection`` is a single connection; what is
declared and published is up to the caller.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from concurrent import futures
from dataclasses import dataclass
from urllib.parse import urlsplit

import pika

from tuswsgi.connections.amqp_connection import (
    BrokerUnavailable,
    Connection,
    ConnectionLost,
    Declare,
    Message,
    PublishFailed,
)
from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import ConfigurationError

#: The timeout of a message for which no request waits, in seconds. A connection that the broker
#: blocks for lack of memory or disk is closed after the same time.
PATIENCE = 10.0

#: How long the broker is left alone after failures.
_BACKOFF = Backoff(first=1.0, longest=5.0, jitter=0)

#: The least time, in seconds, after which a broker counts as hanging. A message may have less
#: time than a broker that is well takes to confirm it.
_LEAST_SILENCE = 0.5

#: Seconds between two checks of an idle connection: half of the shortest heartbeat interval.
_CHECK_INTERVAL = 0.5

#: Seconds that the handshakes at the end of all connections may take.
_CLOSE_TIMEOUT = 1.0


def parse_url(url: str) -> pika.URLParameters:
    """Return the parameters of a URL such as ``amqp://user:password@host:5672/vhost``.

    :raises ConfigurationError: if it is not the URL of a broker. The message does not repeat
        the URL, which has a password.
    """
    try:
        if urlsplit(url).scheme not in ("amqp", "amqps"):  # pika treats all others as amqp
            raise ValueError("another protocol")
        parameters = pika.URLParameters(url)
    except Exception:  # pika passes on those of its parsers
        raise ConfigurationError(
            "The URL of the AMQP broker is not like amqp://user:password@host:5672/vhost."
        ) from None
    parameters.blocked_connection_timeout = parameters.blocked_connection_timeout or PATIENCE
    if parameters.connection_attempts == 1:
        # The first attempt may reach a broker or a proxy that is shutting down.
        parameters.connection_attempts = 2
        parameters.retry_delay = 0
    properties = parameters.client_properties or {}
    parameters.client_properties = {"connection_name": "tuswsgi", **properties}
    return parameters


@dataclass(frozen=True)
class PoolSettings:
    """The settings of a pool.

    :param size: the most connections.
    :param idle_connection: seconds after which an unused connection closes; ``None`` for never.
    :param idle_channel: likewise for its channel.
    :param declare: declares exchanges and queues before a connection's first message.
    """

    parameters: pika.connection.Parameters
    size: int = 10
    idle_connection: float | None = None
    idle_channel: float | None = None
    declare: Declare | None = None


class Job:
    """A message to publish, ``None`` to declare only, and the future of its publisher."""

    def __init__(self, message: Message | None) -> None:
        self.message = message
        self.future: futures.Future[None] = futures.Future()

    def run(self, connection: Connection) -> None:
        """Do the job and set its future.

        :raises ConnectionLost: if the connection has ended.
        """
        try:
            if self.message is None:
                connection.declare()
            else:
                connection.publish(self.message)
        except PublishFailed as error:
            self.future.set_exception(error)
            if isinstance(error, ConnectionLost):
                raise
        else:
            self.future.set_result(None)


class Broker:
    """The connections of one process to a broker.

    Publishers put their messages into a queue that the connections share. Another connection is
    opened when all are busy. A broker that cannot be reached or does not answer is left alone for
    1 to 5 seconds, in which messages fail at once.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._unfinished = 0
        self._closed = False
        self._failures = 0
        self._retry_at = 0.0
        self._open_more_at = 0.0
        if not (logger := logging.getLogger("pika")).level:
            # It logs each failure several times; we log it once.
            logger.setLevel(logging.CRITICAL)

    def publish(self, message: Message, timeout: float) -> None:
        """Publish a message and wait for the broker's confirmation.

        :param timeout: the longest wait, in seconds.
        :raises PublishFailed: if the broker did not confirm the message. It may have it
            nevertheless.
        """
        self._run(message, timeout)

    def declare(self, timeout: float) -> None:
        """Connect, and declare exchanges and queues unless that is done.

        :raises PublishFailed: if that failed.
        """
        self._run(None, timeout)

    def close(self) -> None:
        """Close all connections. Messages that take longer than a second fail."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        for _ in workers:
            self.jobs.put(None)
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        for worker in workers:
            worker.abort()
        for worker in workers:
            worker.thread.join(_CLOSE_TIMEOUT)

    def _run(self, message: Message | None, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for _ in range(self.settings.size):
            try:
                self._try(message, deadline, timeout)
                return
            except ConnectionLost:
                pass  # the other connections may have been lost with it
        self._try(message, deadline, timeout)

    def _try(self, message: Message | None, deadline: float, timeout: float) -> None:
        job = Job(message)
        self._submit(job)
        try:
            job.future.result(max(0.0, deadline - time.monotonic()))
        except futures.TimeoutError:
            job.future.cancel()
            self._abort_silent(max(timeout / 2, _LEAST_SILENCE))
            raise PublishFailed("the broker took too long") from None
        with self._lock:
            self._failures = 0
            self._retry_at = 0.0

    def _submit(self, job: Job) -> None:
        with self._lock:
            if self._closed:
                raise BrokerUnavailable("the server stops")
            if time.monotonic() < self._retry_at:
                raise BrokerUnavailable("the broker could not be reached a moment ago")
            all_busy = self._unfinished >= len(self._workers)
            if all_busy and self._may_open():
                self._workers.append(Worker(self))
            self._unfinished += 1
            self.jobs.put(job)
        job.future.add_done_callback(self._finished)

    def _finished(self, future: object) -> None:
        with self._lock:
            self._unfinished -= 1

    def _abort_silent(self, seconds: float) -> None:
        """Abort connections that have waited for the broker for so long."""
        before = time.monotonic() - seconds
        with self._lock:
            silent = [worker for worker in self._workers if worker.busy_since < before]
        for worker in silent:
            worker.abort()
        if silent:
            self.failed()

    def failed(self) -> None:
        """The broker cannot be reached or does not answer."""
        with self._lock:
            now = time.monotonic()
            if now >= self._retry_at:  # else others have reported the same failure
                self._failures += 1
                self._retry_at = now + _BACKOFF.after(self._failures)

    def _may_open(self) -> bool:
        if not self._workers:
            return True
        is_time = time.monotonic() >= self._open_more_at
        return is_time and len(self._workers) < self.settings.size

    def not_connected(self, worker: Worker) -> None:
        """A worker could not connect. The broker may allow no more connections than there are."""
        with self._lock:
            has_others = any(other.is_connected for other in self._workers if other is not worker)
            if has_others:
                self._open_more_at = time.monotonic() + _BACKOFF.longest
        if not has_others:
            self.failed()

    def remove_idle(self, worker: Worker) -> bool:
        """Remove a worker unless there are jobs for it; return whether it is removed."""
        with self._lock:
            if not self.jobs.empty():
                return False
            self._workers.remove(worker)
            return True

    def remove(self, worker: Worker, error: PublishFailed) -> None:
        """Remove a worker that has ended. Without another one, waiting jobs fail."""
        with self._lock:
            if worker in self._workers:
                self._workers.remove(worker)
            left = [] if self._workers else self._take_all()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _take_all(self) -> list[Job]:
        jobs = []
        while not self.jobs.empty():
            if (job := self.jobs.get()) is not None:
                jobs.append(job)
        return jobs


class Worker:
    """A thread (greenlet) and the connection that it owns."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._connection: Connection | None = None
        #: When it started to connect or to publish; infinite while it is idle.
        self.busy_since = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="tuswsgi-amqp", daemon=True)
        self.thread.start()

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    def abort(self) -> None:
        """Abort the connection. Until it is open, pika's own timeouts apply."""
        if self._connection is not None:
            self._connection.abort()

    def _run(self) -> None:
        settings = self._broker.settings
        error: PublishFailed = BrokerUnavailable("the server stops")
        try:
            self._connection = Connection(settings.parameters, settings.declare)
            self.busy_since = math.inf
            self._serve(self._connection)
        except BrokerUnavailable as failure:
            self._broker.not_connected(self)
            error = failure
        except ConnectionLost as failure:
            error = failure
        finally:
            self._broker.remove(self, error)
            if self._connection is not None:
                self._connection.close()

    def _serve(self, connection: Connection) -> None:
        """Publish until the pool closes or the connection has been idle for too long."""
        settings = self._broker.settings
        idle = settings.idle_connection or math.inf
        interval = min(_CHECK_INTERVAL, idle / 2, (settings.idle_channel or math.inf) / 2)
        while True:
            try:
                job = self._broker.jobs.get(timeout=interval)
            except queue.Empty:
                if connection.is_foreign():
                    return  # greenlets survive a fork
                connection.keep_alive(settings.idle_channel)
                if connection.idle_for() >= idle and self._broker.remove_idle(self):
                    return
                continue
            if job is None:
                return
            if job.future.set_running_or_notify_cancel():
                self.busy_since = time.monotonic()
                job.run(connection)
                self.busy_since = math.inf
