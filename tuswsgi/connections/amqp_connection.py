"""A connection to an AMQP broker, on top of pika's ``BlockingConnection``.

The pool in ``connections.amqp`` decides which thread uses it, and for how long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import (
    AMQPConnectionError,
    AMQPHeartbeatTimeout,
    ChannelClosedByBroker,
    NackError,
    UnroutableError,
)


class PublishFailed(Exception):
    """The broker did not confirm a message."""


class BrokerUnavailable(PublishFailed):
    """There is no connection to the broker."""


class ConnectionLost(PublishFailed):
    """The connection ended while the message was on its way."""


class Unroutable(PublishFailed):
    """The message's exchange does not exist, or no queue is bound for the message."""


@dataclass(frozen=True)
class Message:
    """A message to publish.

    :param mandatory: fail if there is no queue for it.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: pika.BasicProperties
    mandatory: bool


#: Declares exchanges and queues.
Declare = Callable[[BlockingChannel], None]


class Connection:
    """A connection with one channel, which publishes one message at a time.

    It belongs to the thread that made it; other threads may only call ``abort``.

    :param declare: called before the first message, and again when a message was unroutable.
    :raises BrokerUnavailable: if the broker cannot be reached.
    """

    def __init__(self, parameters: pika.connection.Parameters, declare: Declare | None) -> None:
        self._declare = declare
        self._is_declared = declare is None
        self._channel: BlockingChannel | None = None
        self._used_at = time.monotonic()
        self._pid = os.getpid()
        try:
            self._connection = pika.BlockingConnection(parameters)
        except Exception as error:  # also of sockets, TLS and name resolution
            raise BrokerUnavailable(_describe(error)) from error

    def publish(self, message: Message) -> None:
        """Publish a message and wait for the broker's confirmation.

        :raises PublishFailed: if it was not confirmed.
        """
        self.declare()
        try:
            self._publish(message)
        except Unroutable:
            if self._declare is None:
                raise
            self._is_declared = False
            self.declare()
            self._publish(message)

    def declare(self) -> None:
        """Declare exchanges and queues, unless that is done.

        :raises PublishFailed: if the broker refused.
        """
        if self._declare is not None and not self._is_declared:
            with _translated_errors():
                self._declare(self._open_channel())
            self._is_declared = True

    def keep_alive(self, idle_channel: float | None) -> None:
        """Answer heartbeats; call this at least twice in the interval of heartbeats.

        :param idle_channel: close the channel if it was unused for so many seconds.
        :raises ConnectionLost: if the connection has ended.
        """
        with _translated_errors():
            self._connection.process_data_events(0)
            if self._channel is not None and idle_channel and self.idle_for() >= idle_channel:
                self._channel.close()
                self._channel = None

    def idle_for(self) -> float:
        """Return the seconds since the last message."""
        return time.monotonic() - self._used_at

    def is_foreign(self) -> bool:
        """Return whether it belongs to the parent of this forked process, which must not use it."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Close the connection if it is open. If the broker hangs, this takes minutes."""
        if not self.is_foreign():
            with suppress(Exception):  # it has ended, or does now
                self._connection.close()

    def abort(self) -> None:
        """Close the connection at once; a call under way in its thread fails.

        May be called from any thread, also for a connection that has ended.
        """
        # pika has no public method that does not wait for the broker.
        connection = self._connection._impl
        error = AMQPHeartbeatTimeout("the broker does not answer")
        connection.ioloop.add_callback_threadsafe(partial(connection._terminate_stream, error))

    def _publish(self, message: Message) -> None:
        with _translated_errors():
            self._open_channel().basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                message.properties,
                mandatory=message.mandatory,
            )
        self._used_at = time.monotonic()

    def _open_channel(self) -> BlockingChannel:
        if self._channel is None or not self._channel.is_open:
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
        return self._channel


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except UnroutableError as error:
        reason = error.messages[0].method.reply_text
        raise Unroutable(f"the broker returned the message: {reason}") from error
    except NackError as error:
        raise PublishFailed("the broker refused the message") from error
    except ChannelClosedByBroker as error:
        kind = Unroutable if error.reply_code == 404 else PublishFailed
        raise kind(f"{error.reply_code} {error.reply_text}") from error
    except Exception as error:  # also of pika's state machine, after errors of the connection
        raise ConnectionLost(_describe(error)) from error


def _describe(error: BaseException) -> str:
    """Return the exception that pika's connection errors wrap, as text."""
    while isinstance(error, AMQPConnectionError) and isinstance(
        (*error.args, None)[0], BaseException
    ):
        error = error.args[0]
    return repr(getattr(error, "exception", error))
