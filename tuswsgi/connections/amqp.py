"""Connections to an AMQP broker: a bounded pool of them, as hooks see it.

This file owns how many connections there are, who waits how long for what, and what happens
while the broker is away. A single connection is the business of
``connections.amqp_connection``, what is declared and what messages look like that of those
who use it.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent import futures
from functools import partial
from urllib.parse import urlsplit

import pika

from tuswsgi.connections.amqp_connection import (
    FAREWELL,
    BrokerAway,
    Connection,
    ConnectionLost,
    Job,
    Message,
    NowhereToGo,
    PublishFailed,
    Settings,
)
from tuswsgi.core.errors import ConfigurationError

#: Seconds for which somebody may wait whom no request waits for, and for which a connection
#: is kept on which the broker takes nothing.
PATIENCE = 10.0

#: Seconds for which a broker is left alone that failed: the first time, and at most.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 5.0


def parameters_of(url: str) -> pika.URLParameters:
    """Return what pika needs to know, with a time limit where the URL sets none.

    :raises ConfigurationError: if that is no URL of a broker; it does not repeat the URL,
        which has a password.
    """
    try:
        if urlsplit(url).scheme not in ("amqp", "amqps"):  # pika takes every other for amqp
            raise ValueError("another protocol")
        parameters = pika.URLParameters(url)
    except Exception:  # pika raises whatever its parts raise
        raise ConfigurationError(
            "The URL of the AMQP broker is not like amqp://user:password@host:5672/vhost."
        ) from None
    # What connecting may take is limited anyway, a broker that is out of memory is not.
    parameters.blocked_connection_timeout = parameters.blocked_connection_timeout or PATIENCE
    properties = parameters.client_properties or {}
    parameters.client_properties = {"connection_name": "tuswsgi", **properties}
    return parameters


class Broker:
    """The pool of connections of one process.

    A channel carries one message at a time, a connection as many as it has channels, and a
    connection more is opened when all are busy. A broker that cannot be reached, or that
    hangs, is left alone for a moment that grows from 1 to 5 seconds: until then messages
    fail at once.

    Declarations are run again when what they declared is not there any more.

    :param size: how many connections there are at most.
    """

    def __init__(self, settings: Settings, size: int = 10) -> None:
        self._settings = settings
        self._size = size
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._closed = False
        self._pause = 0.0
        self._away_until = 0.0
        if not (logger := logging.getLogger("pika")).level:
            # It tells each trouble several times, as errors; who publishes tells it once.
            logger.setLevel(logging.CRITICAL)

    def publish(self, message: Message, timeout: float) -> None:
        """Publish a message and wait until the broker has it.

        :param timeout: how long to wait at most, in seconds.
        :raises PublishFailed: if the broker did not say that it has it. It may have it
            nevertheless.
        """
        self._try_twice(message, time.monotonic() + timeout)

    def declare(self, timeout: float) -> None:
        """Connect and declare, if that was not done yet.

        :raises PublishFailed: if that did not work.
        """
        self._try_twice(None, time.monotonic() + timeout)

    def close(self) -> None:
        """End all connections; what is under way fails."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.join(2 * FAREWELL)

    def _try_twice(self, message: Message | None, deadline: float) -> None:
        try:
            self._try(message, deadline)
        except ConnectionLost:
            self._try(message, deadline)
        except NowhereToGo:
            if not self._settings.declarations:
                raise
            with self._lock:
                for connection in self._connections:
                    connection.declared = False
            self._try(message, deadline)

    def _try(self, message: Message | None, deadline: float) -> None:
        started = time.monotonic()
        job = Job(message)
        connection = self._submit(job)
        try:
            job.future.result(max(0.0, deadline - started))
        except futures.TimeoutError:
            job.future.cancel()
            # Where others are served meanwhile there are just too many.
            if connection.progress_at < started:
                self.failed()
                connection.give_up()
            raise PublishFailed("the broker took too long") from None
        with self._lock:
            self._pause = self._away_until = 0.0

    def _submit(self, job: Job) -> Connection:
        with self._lock:
            if self._closed:
                raise BrokerAway("the server stops")
            if time.monotonic() < self._away_until:
                raise BrokerAway("the broker could not be reached a moment ago")
            connection = min(self._connections, key=lambda one: one.load, default=None)
            may_open = len(self._connections) < self._size
            if connection is None or (connection.load >= self._settings.channels and may_open):
                connection = Connection(self._settings, self)
                self._connections.append(connection)
            connection.load += 1
            connection.waiting.append(job)
        job.future.add_done_callback(partial(self._done, connection))
        connection.wake()
        return connection

    def _done(self, connection: Connection, future: object) -> None:
        with self._lock:
            connection.load -= 1

    def failed(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now >= self._away_until:  # else many noticed the same trouble
                self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
                self._away_until = now + self._pause

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._remove(connection)

    def forget_idle(self, connection: Connection) -> bool:
        with self._lock:
            if connection.load:
                return False
            self._remove(connection)
            return True

    def _remove(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
