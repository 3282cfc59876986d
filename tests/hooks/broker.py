"""A broker as tests see it: names of their own in it, and a line to it that can break."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pika

#: How long to wait for what must happen, on a machine that is busy.
PATIENCE = 60.0

#: Frames, as they look to somebody who reads along.
HEARTBEAT = b"\x08\0\0\0\0\0\0\xce"
CHANNEL_OPEN = b"\0\x14\0\x0a"
CHANNEL_CLOSE = b"\0\x14\0\x28"


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Inspector:
    """Looks into the broker, and removes at the end what the test made there.

    :param name: the beginning of the names of all queues and exchanges of the test.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self._connection.channel()
        self._queues: set[str] = set()
        self._exchanges: set[str] = set()

    def queue(self, suffix: str = "") -> str:
        """Return the name of a queue that will be removed."""
        self._queues.add(self.name + suffix)
        return self.name + suffix

    def exchange(self, suffix: str = "") -> str:
        self._exchanges.add(self.name + suffix)
        return self.name + suffix

    def exists(self, queue: str) -> bool:
        return self._succeeds(lambda channel: channel.queue_declare(queue, passive=True))

    def is_queue(self, queue: str, **properties: bool) -> bool:
        """Whether a queue has these properties: declaring it with others is an error."""
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
        """Take the next message, which must be there."""
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


class Line:
    """A way to the broker, which a test can cut, block and open again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        host = f"{parts.username}:{parts.password}@127.0.0.1:{port}"
        self.url = parts._replace(netloc=host).geturl()
        #: What clients sent.
        self.sent = b""
        #: How many connections there were, and which there are.
        self.accepted = 0
        self.open: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self._is_there = True
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """The broker has gone: all connections end, and new ones at once."""
        self._is_there = False
        self.drop()

    def restore(self) -> None:
        self._is_there = True

    def block(self) -> None:
        """The broker hangs: nothing arrives any more."""
        self._flows.clear()

    def unblock(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self._closing = True
        self._flows.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """End all connections; new ones work."""
        for end in list(self.open):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has just ended

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._is_there:
                client.close()
                continue
            self.accepted += 1
            self.open.append(client)
            server = socket.create_connection(self._target)
            for flow in (self._upwards, self._downwards):
                threading.Thread(target=flow, args=(client, server), daemon=True).start()

    def _upwards(self, client: socket.socket, server: socket.socket) -> None:
        self._copy(client, server, record=True)
        self.open.remove(client)
        client.close()

    def _downwards(self, client: socket.socket, server: socket.socket) -> None:
        self._copy(server, client)
        server.close()

    def _copy(self, source: socket.socket, target: socket.socket, *, record: bool = False) -> None:
        try:
            while data := source.recv(65536):
                if record:
                    self.sent += data
                self._flows.wait()
                target.sendall(data)
        except OSError:
            pass  # the end of both directions
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
