"""gunicorn's gevent worker, as ``tuswsgi serve`` uses it.

At SIGTERM it interrupts uploads, accepts no more connections and closes idle ones. A response 100
is sent when the application first reads the body. Plain requests are served by ``http1``. All
features also work with ``-k gevent``, where clients get the 100 before anything was checked.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from inspect import isroutine
from ssl import SSLError
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer
from gunicorn.errors import AppImportError
from gunicorn.http.errors import NoMoreData
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from tuswsgi.app import Tus
from tuswsgi.core.errors import ConfigurationError, TusError
from tuswsgi.core.options import KiB
from tuswsgi.observing.logs import current_request
from tuswsgi.transfer.gunicorn import adopt_reader, drain, is_read, missing_internals
from tuswsgi.transfer.sockets import linger

log = logging.getLogger(__name__)

#: How long requests are still taken from connections that were idle at SIGTERM (seconds).
_LAST_CALL = 1.0


class TusWorker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gevent worker for an application that has a ``Tus`` as an extension."""

    #: The most bytes of a request's head; overwritten by the server's settings.
    max_head_size = 128 * KiB

    _tus: Tus | None = None
    alive: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: When each idle greenlet began to wait for a request, on the monotonic clock.
        self._idle: dict[Any, float] = {}
        self._stopping = Event()
        self._servers: list[StreamServer] = []
        #: Whether bodies and plain requests can be served past gunicorn.
        self._knows_gunicorn = False
        self._serves_plain = False
        #: The reasons that were logged why uploads cannot be served.
        self._reasons: set[str] = set()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        # A call of an object costs each waiting connection one more frame of the C stack than a
        # call of its method.
        self._application = self.wsgi if isroutine(self.wsgi) else self.wsgi.__call__
        missing = missing_internals()
        if missing:
            log.warning("This gunicorn lacks %s: it is slower than it could be", ", ".join(missing))
        self._knows_gunicorn = not missing
        self._serves_plain = not missing and _is_ordinary(self.cfg)
        self._tus = getattr(self.wsgi, "extensions", {}).get("tuswsgi")
        try:
            self._start_tus()
        except ConfigurationError as error:
            if self.age <= self.cfg.workers:
                # With this error gunicorn gives up instead of starting more workers.
                raise AppImportError(str(error)) from error
            # It was valid when the server started, so it may be valid again.
            self._log_unavailable(str(error))
        # All that is loaded by now stays. Collecting garbage in it again and again would hold up
        # all connections.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: Any) -> None:
        # A signal handler may run anywhere, so this only sets flags.
        super().handle_exit(sig, frame)
        if self._tus is not None:
            self._tus.stop_uploads()
        gevent.get_hub().loop.run_callback_threadsafe(self._stopping.set)

    def handle_quit(self, sig: int, frame: Any) -> None:
        # A terminal sends Ctrl-C to each worker, too; gunicorn's handler would abort requests.
        if sig == signal.SIGINT:
            self.handle_exit(sig, frame)
            return
        if self._tus is not None:
            self._tus.stop_uploads()
        super().handle_quit(sig, frame)

    def run(self) -> None:
        # gunicorn's own loop notices a stop up to a second later, and until then accepts
        # connections whose uploads it would interrupt at once.
        servers = self._servers = [self._serve(listener) for listener in self.sockets]
        while self.alive:
            self._tick()
            self._stopping.wait(1.0)
        for server in servers:
            server.close()
        self._join(servers, _LAST_CALL)
        # Otherwise the worker would wait for idle connections.
        self._close_idle(0)
        self._join(servers, self.cfg.graceful_timeout)
        for server in servers:
            server.stop(timeout=1)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        if self.cfg.is_ssl and not self._handshake(client):
            client.close()
        elif self._serves_plain:
            self._serve_requests(listener, client, addr)
        else:
            super().handle(listener, client, addr)

    def timeout_ctx(self) -> _Idle:
        # gunicorn's own loop uses it while it waits for a request.
        return _Idle(self._idle)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        if self._tus is not None and getattr(req, "_expected_100_continue", False):
            req._expected_100_continue = False
            req.body.send_continue = lambda: sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The environ has one string for a field that is repeated. Plain requests have none.
        req.body.request_fields = req.headers
        if not self._knows_gunicorn:
            super().handle_request(listener_name, req, sock, addr)
            return
        adopt_reader(req.body.reader)
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            self._leave(req, sock)
            raise
        self._finish(req, sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        super().handle_error(req, client, addr, exc)
        if isinstance(exc, Exception):
            # The client may still be sending. A greenlet that is killed has no time for that.
            linger(client)

    def _finish(self, request: Any, sock: Any) -> None:
        """Read a body that the application has not read, or close the connection.

        :raises StopIteration: if the connection is to be closed.
        """
        if is_read(request.body):
            return
        # When reading fails, the body itself takes care of the client.
        if not request.body.failed:
            if drain(request.body, sock):
                return
            linger(sock)
        raise StopIteration

    def _leave(self, request: Any, sock: Any) -> None:
        """Let a client that is still sending read the response before the connection is closed."""
        if not request.body.failed and not is_read(request.body):
            linger(sock)

    def _serve_requests(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve the requests of a connection, those that are not plain as gunicorn does it."""
        from tuswsgi.serving import http1  # needs a gunicorn as expected

        request = None
        try:
            name = listener.getsockname()
            parser = http1.PlainParser(self.cfg, client, addr, self.max_head_size)
            environs = http1.PlainEnviron(self.cfg, client, addr, name)
            idle = self.timeout_ctx()
            while True:
                request = None
                with idle:
                    request = next(parser)
                if request is None:
                    break
                if type(request) is http1.PlainRequest:
                    self._answer(request, http1.PlainResponse(request, client, self.cfg), environs)
                else:
                    self.handle_request(name, request, client, addr)
        except (StopIteration, NoMoreData) as end:
            self.log.debug("A connection ends: %s", end)
        except OSError as error:
            # A TLS error is the client's or the network's fault.
            gone = error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
            if gone or isinstance(error, SSLError):
                self.log.debug("The client went away: %s", error)
            else:
                self.log.exception("A connection failed")
        except Exception as error:
            self.handle_error(request, client, addr, error)
        finally:
            client.close()

    def _answer(self, request: Any, response: Any, environs: Any) -> None:
        """Run the application for a plain request and send what it answers.

        :raises StopIteration: if the connection is to be closed.
        """
        began = datetime.now() if self.log.access_log_enabled else None
        environ = environs.of(request)
        self.nr += 1
        if self.nr >= self.max_requests and self.alive:
            self.log.info("The worker has served its requests and is replaced")
            self.alive = False
        if not self.alive:
            response.force_close()
        try:
            content = self._application(environ, response.start_response)
            if self.is_already_handled(content):
                return
            try:
                if isinstance(content, environ["wsgi.file_wrapper"]):
                    response.write_file(content)
                else:
                    for block in content:
                        response.write(block)
                response.close()
            finally:
                if began is not None:
                    self.log.access(response, request, environ, datetime.now() - began)
                if (close := getattr(content, "close", None)) is not None:
                    close()
        except OSError:
            raise
        except Exception:
            if not response.headers_sent:
                raise
            # An error page in the middle of a response would make it worse.
            self.log.exception("A response broke off")
            raise StopIteration from None
        if response.should_close():
            self._leave(request, response.sock)
            raise StopIteration
        if request.body.reader.length:
            self._finish(request, response.sock)

    def _serve(self, listener: Any) -> StreamServer:
        listener.setblocking(1)
        tls: dict[str, Any] = {}
        if self.cfg.is_ssl:
            tls = {"ssl_context": ssl_context(self.cfg), "do_handshake_on_connect": False}
        pool = Pool(self.worker_connections)
        handle = partial(self.handle, _Name(listener.getsockname()))
        server = StreamServer(listener, handle, spawn=pool, **tls)
        if self.cfg.workers > 1:
            server.max_accept = 1  # the next one is for another worker
        server.start()
        return server

    def _handshake(self, client: Any) -> bool:
        # gevent's own handshake waits for ever for a silent client.
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
                self._tick()
                server.pool.join(min(left, 1.0))

    def _tick(self) -> None:
        """Do the periodic work, each second."""
        self.notify()
        self._close_idle(self.cfg.keepalive)
        if self._tus is not None and self._tus.metrics is not None:
            number = sum(len(server.pool) for server in self._servers)
            self._tus.metrics.set_open_connections(number)
        try:
            self._start_tus()
        except ConfigurationError as error:
            self._log_unavailable(str(error))

    def _start_tus(self) -> None:
        if self._tus is None or self._tus.is_started:
            return
        try:
            self._tus.start()
        except TusError as error:
            # A worker that is replaced while a database is away must not end the server.
            self._log_unavailable(str(error.__cause__ or "the log says why above"))
        except OSError as error:
            self._log_unavailable(str(error))
        else:
            if self._reasons:
                log.info("Uploads can be served now")

    def _log_unavailable(self, reason: str) -> None:
        """Log why uploads cannot be served, each reason once."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            log.error("Uploads cannot be served yet; trying again each second: %s", reason)

    def _close_idle(self, seconds: float) -> None:
        """Close the connections that have been idle for so many seconds."""
        # Looking at all of them each second is far cheaper than a timer per request.
        latest = time.monotonic() - seconds
        for greenlet, since in tuple(self._idle.items()):
            if since <= latest:
                gevent.get_hub().loop.run_callback(self._end_wait, greenlet, since)

    def _end_wait(self, greenlet: Any, since: float) -> None:
        # In the hub, so an idle greenlet is waiting for its socket.
        if self._idle.get(greenlet) == since:
            greenlet.throw(_Silence)


def _is_ordinary(cfg: Any) -> bool:
    """Return whether there is no setting that only gunicorn's own parser and loop support."""
    return (
        bool(cfg.keepalive)
        and not cfg.secure_scheme_headers
        and not cfg.forwarder_headers
        and cfg.settings["pre_request"].get() is cfg.settings["pre_request"].default
        and cfg.settings["post_request"].get() is cfg.settings["post_request"].default
        and str(getattr(cfg, "protocol", "http")) == "http"
        and str(getattr(cfg, "proxy_protocol", "off")).lower() in ("off", "false")
        and not os.environ.get("SCRIPT_NAME")
        and getattr(cfg, "http_protocols", "h1") in ("h1", ["h1"])
    )


class _Name:
    """A stand-in for a listener that only knows its name.

    At SIGTERM a listener may be closed before a connection that it accepted is served.
    """

    def __init__(self, name: Any) -> None:
        self._name = name

    def getsockname(self) -> Any:
        return self._name


class _Silence(BaseException):
    """Thrown into a greenlet that waits for a request. Never leaves ``_Idle``."""


class _Idle:
    """A context in which the current greenlet waits for a request; it is reusable.

    The worker ends the context when the wait takes too long.

    :param idle: the worker's idle greenlets, with the time at which each began to wait.
    """

    __slots__ = ("_greenlet", "_idle")

    def __init__(self, idle: dict[Any, float]) -> None:
        self._idle = idle
        self._greenlet = gevent.getcurrent()

    def __enter__(self) -> None:
        current_request.set(None)
        self._idle[self._greenlet] = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        del self._idle[self._greenlet]
        return kind is _Silence
