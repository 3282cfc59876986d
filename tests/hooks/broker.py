"""Access to the queues and exchanges of a test in an AMQP broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pika

#: Seconds to wait for an event on a busy machine.
PATIENCE = 60.0

#: Frames, or parts of them, in what is sent over a connection.
HEARTBEAT = b"\x08\0\0\0\0\0\0\xce"
CONNECTION_BLOCKED = b"\1\0\0\0\0\0\x0f\0\x0a\0\x3c\x0alow memory\xce"
CHANNEL_OPEN = b"\0\x14\0\x0a"
CHANNEL_CLOSE = b"\0\x14\0\x28"


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Inspector:
    """Inspects the queues and exchanges of a test, and deletes them at its end.

    :param name: the prefix of their names.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self._connection.channel()
        self._queues: set[str] = set()
        self._exchanges: set[str] = set()

    def queue(self, suffix: str = "") -> str:
        """Return the name of a queue, which ``close`` deletes."""
        self._queues.add(self.name + suffix)
        return self.name + suffix

    def exchange(self, suffix: str = "") -> str:
        self._exchanges.add(self.name + suffix)
        return self.name + suffix

    def exists(self, queue: str) -> bool:
        return self._succeeds(lambda channel: channel.queue_declare(queue, passive=True))

    def is_queue(self, queue: str, **properties: bool) -> bool:
        """Return whether a queue has these properties: declaring it with others is an error."""
        return self._succeeds(lambda channel: channel.queue_declare(queue, **properties))

    def is_exchange(self, exchange: str, kind: str, **properties: bool) -> bool:
        return self._succeeds(
            lambda channel: channel.exchange_declare(exchange, kind, **properties)
        )

    def _succeeds(self, call: Callable[[Any], object]) -> bool:
        channel = self._connection.channel()
        try:
            call(channel)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        channel.close()
        return True

    def take(self, queue: str) -> tuple[pika.BasicProperties, bytes]:
        """Return the next message; there must be one."""
        method, properties, body = self.channel.basic_get(queue, auto_ack=True)
        assert method is not None, f"nothing in {queue}"
        return properties, body

    def take_all(self, queue: str) -> list[tuple[pika.BasicProperties, bytes]]:
        taken = []
        while (got := self.channel.basic_get(queue, auto_ack=True))[0] is not None:
            taken.append(got[1:])
        return taken

    def close(self) -> None:
        for queue in self._queues:
            self.channel.queue_delete(queue)
        for exchange in self._exchanges:
            self.channel.exchange_delete(exchange)
        self._connection.close()
