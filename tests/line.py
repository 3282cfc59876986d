"""A line to a server that tests can cut: a proxy in a thread."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit


class Line:
    """A way to a server, which a test can cut, block and open again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        userinfo, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{userinfo}{at}127.0.0.1:{port}").geturl()
        #: What clients sent.
        self.sent = b""
        #: How many connections there were, and which there are.
        self.accepted = 0
        self.refused = 0
        self.open: list[socket.socket] = []
        self.loses_answer = False
        #: What a client says last before the server goes, and who said it.
        self._last_words: bytes | None = None
        self._restarts = False
        self._doomed: socket.socket | None = None
        self._flows = threading.Event()
        self._flows.set()
        self._is_there = True
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """The server has gone: all connections end, and new ones at once."""
        self._is_there = False
        self.drop()

    def restore(self) -> None:
        self._is_there = True

    def refuse(self) -> None:
        """The server accepts no more connections than it has."""
        self._is_there = False

    def block(self) -> None:
        """The server hangs: nothing arrives any more."""
        self._flows.clear()

    def lose_answer(self) -> None:
        """The server's next answer gets lost, and its connection with it."""
        self.loses_answer = True

    def cut_after(self, text: bytes, *, restarts: bool = False) -> None:
        """The server goes when it has done what a request with `text` wants of it, and before
        anybody hears of that.

        :param restarts: it is back at once.
        """
        self._last_words, self._restarts = text, restarts

    def say(self, data: bytes) -> None:
        """Send something to all clients, as if the server said it."""
        for client in list(self.open):
            client.sendall(data)

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
                self.refused += 1
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
        self._copy(server, client, is_answer=True)
        server.close()

    def _copy(
        self,
        source: socket.socket,
        target: socket.socket,
        *,
        record: bool = False,
        is_answer: bool = False,
    ) -> None:
        try:
            while data := source.recv(65536):
                if record:
                    self.sent += data
                if record and self._last_words is not None and self._last_words in data:
                    self._last_words, self._doomed = None, source
                if is_answer and self.loses_answer:
                    self.loses_answer = False
                    break
                if is_answer and target is self._doomed:
                    (self.drop if self._restarts else self.cut)()
                    break
                self._flows.wait()
                target.sendall(data)
        except OSError:
            pass  # the end of both directions
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
