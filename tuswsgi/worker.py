"""gunicorn's gevent worker, as ``tuswsgi serve`` uses it.

It tells the application about SIGTERM, takes no connections then and lets go of idle ones,
and leaves it to the application when a client that asked is told to send its body.
Everything also works under ``-k gevent``, where a client that expects 100 gets it before
anything was checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.errors import AppImportError
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from tuswsgi.app import Tus
from tuswsgi.errors import ConfigurationError
from tuswsgi.web.gunicorn_body import missing_internals

log = logging.getLogger(__name__)

#: How long requests are still taken from connections that were idle at SIGTERM (seconds).
_LAST_CALL = 1.0


class TusWorker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gevent worker for the application of ``create_app``."""

    _tus: Tus | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: set[_Idle] = set()
        self._stopping = Event()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        if missing := missing_internals():
            log.warning("This gunicorn lacks %s: it is slower than it could be", ", ".join(missing))
        self._tus = getattr(self.wsgi, "extensions", {}).get("tuswsgi")
        if self._tus is not None:
            try:
                self._tus.start()
            except ConfigurationError as error:
                # gunicorn gives up after this one instead of trying with new workers.
                raise AppImportError(str(error)) from error

    def handle_exit(self, sig: int, frame: Any) -> None:
        # This runs wherever SIGTERM struck: it sets latches and nothing more.
        super().handle_exit(sig, frame)
        if self._tus is not None:
            self._tus.stop_uploads()
        gevent.get_hub().loop.run_callback_threadsafe(self._stopping.set)

    def run(self) -> None:
        # gunicorn's own looks each second whether to stop. Until then it takes connections
        # that another worker would serve, only to tell their uploads to come back.
        servers = [self._serve(listener) for listener in self.sockets]
        while self.alive:
            self.notify()
            self._stopping.wait(1.0)
        for server in servers:
            server.close()
        self._join(servers, _LAST_CALL)
        self._close_idle()
        self._join(servers, self.cfg.graceful_timeout)
        for server in servers:
            server.stop(timeout=1)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        if not self.cfg.is_ssl or self._shakes_hands(client):
            super().handle(listener, client, addr)
        else:
            client.close()

    def timeout_ctx(self) -> _Idle:
        # gunicorn waits for the next request of a connection inside of this, too.
        return _Idle(self.cfg.keepalive, self._idle)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        if self._tus is not None and getattr(req, "_expected_100_continue", False):
            req._expected_100_continue = False
            req.body.send_continue = lambda: sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        super().handle_request(listener_name, req, sock, addr)

    def _serve(self, listener: Any) -> StreamServer:
        listener.setblocking(1)
        tls: dict[str, Any] = {}
        if self.cfg.is_ssl:
            tls = {"ssl_context": ssl_context(self.cfg), "do_handshake_on_connect": False}
        pool = Pool(self.worker_connections)
        server = StreamServer(listener, partial(self.handle, listener), spawn=pool, **tls)
        if self.cfg.workers > 1:
            server.max_accept = 1  # the next one is for another worker
        server.start()
        return server

    def _shakes_hands(self, client: Any) -> bool:
        # gevent would wait for ever for a client that does not even begin.
        with self.timeout_ctx():
            try:
                client.do_handshake()
            except OSError as error:
                self.log.debug("No TLS connection: %s", error)
                return False
            return True
        return False

    def _join(self, servers: Sequence[StreamServer], timeout: float) -> None:
        """Wait until all connections are closed."""
        deadline = time.monotonic() + timeout
        for server in servers:
            while len(server.pool) and (left := deadline - time.monotonic()) > 0:
                self.notify()
                server.pool.join(min(left, 1.0))

    def _close_idle(self) -> None:
        # Otherwise the worker would wait for clients that have nothing to say, up to the
        # graceful timeout.
        for idle in tuple(self._idle):
            idle.end()


class _Idle(gevent.Timeout):  # type: ignore[misc]
    """The time that a connection may be without a request; it can be cut short."""

    def __init__(self, seconds: float, idle: set[_Idle]) -> None:
        super().__init__(seconds, False)
        self._idle = idle
        self._greenlet = gevent.getcurrent()

    def __enter__(self) -> _Idle:
        self._idle.add(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._idle.discard(self)
        return super().__exit__(*exception)

    def end(self) -> None:
        """Let it run out now. The greenlet waits in its block as long as this is idle."""
        gevent.get_hub().loop.run_callback(self._expire)

    def _expire(self) -> None:
        if self in self._idle:
            self._greenlet.throw(self)
