"""gunicorn's gevent worker, as ``tuswsgi serve`` uses it.

It tells the application about SIGTERM, takes no connections then and lets go of idle ones,
and leaves it to the application when a client that asked is told to send its body. Plain
requests take a shorter way through it (``http1``). Everything also works under
``-k gevent``, where a client that expects 100 gets it before anything was checked.
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
from tuswsgi.transfer.gunicorn import drain, is_read, missing_internals, take_over
from tuswsgi.transfer.sockets import linger

log = logging.getLogger(__name__)

#: How long requests are still taken from connections that were idle at SIGTERM (seconds).
_LAST_CALL = 1.0


class TusWorker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gevent worker for an application that has a ``Tus`` as an extension."""

    #: The most bytes of a request's head. The server's settings say it.
    max_head_size = 128 * KiB

    _tus: Tus | None = None
    alive: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Since when greenlets wait for a request, on the monotonic clock.
        self._idle: dict[Any, float] = {}
        self._stopping = Event()
        self._servers: list[StreamServer] = []
        #: Whether bodies and plain requests can be served past gunicorn.
        self._knows_gunicorn = False
        self._serves_plain = False
        #: Why uploads cannot be served, as the log has it.
        self._troubles: set[str] = set()

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
                # gunicorn gives up after this one instead of trying with new workers.
                raise AppImportError(str(error)) from error
            # It was right when the server began, so it may be again.
            self._tell_of_trouble(str(error))
        # What is loaded by now stays: to look through it for garbage again and again would hold
        # up all connections.
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: Any) -> None:
        # This runs wherever SIGTERM struck: it sets latches and nothing more.
        super().handle_exit(sig, frame)
        if self._tus is not None:
            self._tus.stop_uploads()
        gevent.get_hub().loop.run_callback_threadsafe(self._stopping.set)

    def handle_quit(self, sig: int, frame: Any) -> None:
        # A terminal sends Ctrl-C to each worker itself; gunicorn would break off its requests.
        if sig == signal.SIGINT:
            self.handle_exit(sig, frame)
            return
        if self._tus is not None:
            self._tus.stop_uploads()
        super().handle_quit(sig, frame)

    def run(self) -> None:
        # gunicorn's own looks each second whether to stop. Until then it takes connections
        # that another worker would serve, only to tell their uploads to come back.
        servers = self._servers = [self._serve(listener) for listener in self.sockets]
        while self.alive:
            self._tick()
            self._stopping.wait(1.0)
        for server in servers:
            server.close()
        self._join(servers, _LAST_CALL)
        # Otherwise the worker would wait for clients that have nothing to say.
        self._close_idle(0)
        self._join(servers, self.cfg.graceful_timeout)
        for server in servers:
            server.stop(timeout=1)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        if self.cfg.is_ssl and not self._shakes_hands(client):
            client.close()
        elif self._serves_plain:
            self._serve_requests(listener, client, addr)
        else:
            super().handle(listener, client, addr)

    def timeout_ctx(self) -> _Idle:
        # gunicorn waits for the next request of a connection inside of this, too.
        return _Idle(self._idle)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        if self._tus is not None and getattr(req, "_expected_100_continue", False):
            req._expected_100_continue = False
            req.body.send_continue = lambda: sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Of a field that comes more than once the environ has one string. A request with one is
        # never plain.
        req.body.request_fields = req.headers
        if not self._knows_gunicorn:
            super().handle_request(listener_name, req, sock, addr)
            return
        take_over(req.body.reader)
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            self._leave(req, sock)
            raise
        self._finish(req, sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        super().handle_error(req, client, addr, exc)
        if isinstance(exc, Exception):
            # It may still send what was refused. A greenlet that is killed has no time for that.
            linger(client)

    def _finish(self, request: Any, sock: Any) -> None:
        """Get rid of a body that the application did not read.

        :raises StopIteration: if the connection is to be closed.
        """
        if is_read(request.body):
            return
        # Who gave a body up has seen to its client.
        if not request.body.failed:
            if drain(request.body, sock):
                return
            linger(sock)
        raise StopIteration

    def _leave(self, request: Any, sock: Any) -> None:
        """Let a client that still sends read the answer before the connection is closed."""
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
            # What breaks TLS is the client's or the network's fault.
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
            # Another answer in the middle of this one would make it worse.
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
                self._tick()
                server.pool.join(min(left, 1.0))

    def _tick(self) -> None:
        """Do what is to be done each second."""
        self.notify()
        self._close_idle(self.cfg.keepalive)
        if self._tus is not None and self._tus.metrics is not None:
            number = sum(len(server.pool) for server in self._servers)
            self._tus.metrics.set_open_connections(number)
        try:
            self._start_tus()
        except ConfigurationError as error:
            self._tell_of_trouble(str(error))

    def _start_tus(self) -> None:
        if self._tus is None or self._tus.is_started:
            return
        try:
            self._tus.start()
        except TusError as error:
            # A worker that is made anew while a database is away must not end the server.
            self._tell_of_trouble(str(error.__cause__ or "the log says why above"))
        except OSError as error:
            self._tell_of_trouble(str(error))
        else:
            if self._troubles:
                log.info("Uploads can be served now")

    def _tell_of_trouble(self, reason: str) -> None:
        """Log why uploads cannot be served, unless that is known."""
        if reason not in self._troubles:
            self._troubles.add(reason)
            log.error("Uploads cannot be served yet; trying again each second: %s", reason)

    def _close_idle(self, seconds: float) -> None:
        """Close the connections that have been without a request for so long."""
        # One look at all of them now and then is far cheaper than a timer per request.
        latest = time.monotonic() - seconds
        for greenlet, since in tuple(self._idle.items()):
            if since <= latest:
                gevent.get_hub().loop.run_callback(self._end_wait, greenlet, since)

    def _end_wait(self, greenlet: Any, since: float) -> None:
        # In the hub: a greenlet that is idle waits for its socket then and does nothing else.
        if self._idle.get(greenlet) == since:
            greenlet.throw(_Silence)


def _is_ordinary(cfg: Any) -> bool:
    """Whether nothing is set that only gunicorn's own parser and loop know about."""
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
    """A listener's name, in its stead.

    At SIGTERM listeners are closed, and connections that were just accepted begin after that.
    """

    def __init__(self, name: Any) -> None:
        self._name = name

    def getsockname(self) -> Any:
        return self._name


class _Silence(BaseException):
    """Thrown where a greenlet waits for a request. Never leaves ``_Idle``."""


class _Idle:
    """A block in which the current greenlet waits for a request; it may be entered again.

    The worker ends the block when that takes too long.

    :param idle: where the worker looks for those who wait.
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
