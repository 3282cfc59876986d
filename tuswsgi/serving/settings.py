"""gunicorn's settings, made of the server's settings.

Both ``tuswsgi serve`` and ``conf/gunicorn.conf.py`` get them from ``gunicorn_settings``.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.config.server import LONGEST_LINE, LogLevel, ServerSettings
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import MAIN
from tuswsgi.observing import metrics_directory, sentry
from tuswsgi.observing.logs import LogFormat, LogHandler, formatter
from tuswsgi.observing.sentry import SentrySettings
from tuswsgi.web.settings import MONITORING_PATHS, MonitoringSettings

log = logging.getLogger(__name__)

_LEVELS = {
    LogLevel.OFF: logging.CRITICAL,
    LogLevel.CRITICAL: logging.CRITICAL,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.INFO: logging.INFO,
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.TRACE: logging.DEBUG,
}

_LOGS = {
    LogFormat.TEXT: "tuswsgi.serving.gunicorn_log.TextLog",
    LogFormat.JSON: "tuswsgi.serving.gunicorn_log.JsonLog",
}

#: Apache's combined format, then milliseconds and the request's id.
_ACCESS_FORMAT = (
    '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s" %(M)s %({x-request-id}o)s'
)

#: Handles the records of all loggers but gunicorn's, which have handlers of their own.
_handler = LogHandler()


def gunicorn_settings(config: Config) -> dict[str, Any]:
    """Return gunicorn's settings by their names.

    :raises ConfigurationError: if options contradict each other, or an extra is missing.
    """
    settings = config.build(ServerSettings)
    reports = config.build(SentrySettings)
    sentry.check(reports)
    backends = Backends(config)
    counted = backends.metrics_dir if config.build(MonitoringSettings).metrics else None
    if counted is not None:
        metrics_directory.check_installed()
    return {
        "bind": _bind(settings),
        "reuse_port": settings.reuse_port,
        "certfile": _text(settings.certfile),
        "keyfile": _text(settings.keyfile),
        "workers": _worker_count(settings, backends),
        "worker_class": "tuswsgi.serving.worker.TusWorker",
        "worker_connections": settings.worker_connections,
        # gunicorn limits each field, the worker the whole head.
        "limit_request_field_size": settings.max_head_size // 2,
        "graceful_timeout": math.ceil(settings.graceful_timeout),
        "loglevel": logging.getLevelName(_level(settings)).lower(),
        "logger_class": _LOGS[settings.log_format],
        "accesslog": "-" if settings.access_log else None,
        "access_log_format": _ACCESS_FORMAT,
        **_FIXED,
        "on_starting": lambda arbiter: _begin_master(config, counted, arbiter),
        "on_reload": lambda arbiter: _prepare_process(config, counted, arbiter),
        "on_exit": lambda arbiter: metrics_directory.close_directory(),
        "post_fork": lambda arbiter, worker: _enter(settings, reports, arbiter, worker),
        "post_worker_init": lambda worker: _begin(settings, worker),
        "worker_exit": lambda arbiter, worker: _end(worker),
    }


#: Settings that are not configurable, and why.
_FIXED: dict[str, Any] = {
    "proc_name": "tuswsgi",
    # Each worker makes the application, so that a reload makes it anew.
    "preload_app": False,
    # A worker reports each second unless something blocks it whole. A slow disk may, and
    # killing it would break off all its uploads; one that never comes back is replaced.
    "timeout": 300,
    # Also the time in which the head of a request must arrive. It is more than the 60 s of
    # common proxies: if the server closed idle connections first, requests would get lost.
    "keepalive": 75,
    "limit_request_line": LONGEST_LINE,
    # We have settings of our own for proxies; gunicorn trusts loopback peers by default.
    "forwarded_allow_ips": "",
    "forwarder_headers": "",
    "secure_scheme_headers": {},
    # The control socket would be below the home directory, which may not be writable.
    "control_socket_disable": True,
}


#: No client can connect to the addresses that stand for all others.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ready_lines(settings: ServerSettings, address: Any) -> list[str]:
    """Return the lines that say where to upload, once the server can be reached. The last one is
    the same as rustus'.

    :param address: what the listening socket says of itself, since the port may have been
        any.
    """
    if not isinstance(address, tuple):
        return [f"You can now upload files through the unix socket: {settings.unix_sock}"]
    scheme = "https" if settings.certfile else "http"
    host = _LOOPBACK.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    path = settings.url.strip("/")
    line = f"You can now upload files to: {scheme}://{host}:{address[1]}/" + (path and f"{path}/")
    if settings.host in _LOOPBACK:
        return [f"Listening on all addresses of this host ({settings.host}).", line]
    return [line]


def check_listening(settings: ServerSettings) -> None:
    """Try to listen, since gunicorn would try for five seconds and not say it well.

    :raises ConfigurationError: if the server could not listen.
    """
    _check_certificate(settings)
    where = settings.unix_sock or _bind(settings)
    try:
        if settings.unix_sock:
            _check_unix(settings.unix_sock)
        else:
            _check_tcp(settings)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(f"The server cannot listen at {where}: {reason}.") from error


def _check_certificate(settings: ServerSettings) -> None:
    if settings.certfile is None:
        return
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.certfile, settings.keyfile)
    except OSError as error:
        files = " and ".join(str(file) for file in (settings.certfile, settings.keyfile) if file)
        reason = error.strerror or str(error)
        raise ConfigurationError(f"https cannot be served with {files}: {reason}.") from error


def _check_tcp(settings: ServerSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings.reuse_port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.bind((settings.host, settings.port))


def _check_unix(path: Path) -> None:
    # gunicorn removes a socket that it finds, also that of a server that is alive.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except FileNotFoundError:
            if os.access(path.absolute().parent, os.W_OK | os.X_OK):
                return
            raise
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _bind(settings: ServerSettings) -> str:
    if settings.unix_sock is not None:
        return f"unix:{settings.unix_sock.absolute()}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{host}:{settings.port}"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _worker_count(settings: ServerSettings, backends: Backends) -> int:
    if not backends.in_memory:
        return settings.workers or _processors()
    if settings.workers not in (None, 1):
        raise ConfigurationError(
            f"[{MAIN}] workers = {settings.workers}: A backend keeps its state in memory, which "
            "workers do not share; there can be only one."
        )
    return 1


def _level(settings: ServerSettings) -> int:
    return _LEVELS[settings.log_level]


def _processors() -> int:
    # A container or a systemd unit may have fewer than the machine.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare_process(config: Config, counted: Path | None, arbiter: Any) -> None:
    """Prepare the master, at its start and at a reload.

    :param counted: the directory in which workers share metrics, ``None`` for no metrics.
    """
    settings = config.build(ServerSettings)
    _raise_file_limit()
    set_up_logging(settings)
    for warning in config.warnings:
        log.warning("%s", warning)
    if counted is not None:
        # While one gunicorn replaces another (SIGUSR2), the old one still counts.
        metrics_directory.open_directory(counted, is_successor=bool(arbiter.master_pid))
    access = logging.getLogger("gunicorn.access")
    access.removeFilter(_is_not_health)
    if settings.disable_health_access_log:
        access.addFilter(_is_not_health)


def _begin_master(config: Config, counted: Path | None, arbiter: Any) -> None:
    """Prepare a new master."""
    # gunicorn would abort all requests at Ctrl-C. A second Ctrl-C still does.
    arbiter.handle_int = arbiter.handle_term
    _prepare_process(config, counted, arbiter)


def set_up_logging(settings: ServerSettings) -> None:
    """Set up the logging of this process, also after a reload.

    If the root logger has handlers already, it is left alone.
    """
    logging.disable(logging.CRITICAL if settings.log_level is LogLevel.OFF else logging.NOTSET)
    logging.getLogger("tuswsgi").setLevel(_level(settings))
    _handler.setFormatter(formatter(settings.log_format))
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_handler)


def _raise_file_limit() -> None:
    # Each connection and each file that it writes is a descriptor; the usual soft limit
    # is 1,024 for the sake of programs that use select().
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        # macOS has no hard limit but does not take that for a soft one.
        pass


def _is_not_health(record: logging.LogRecord) -> bool:
    said = record.args.get("U") if isinstance(record.args, Mapping) else None
    return getattr(record, "path", said) not in MONITORING_PATHS


#: The signals that stop a worker.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def _enter(settings: ServerSettings, reports: SentrySettings, arbiter: Any, worker: Any) -> None:
    """Prepare the process of a new worker."""
    # gunicorn has no setting for it.
    worker.max_head_size = settings.max_head_size
    _hold_signals(arbiter)
    sentry.start(reports)


def _hold_signals(arbiter: Any) -> None:
    """Block the signals to a new worker until it has handlers for them.

    Until then it has the master's handlers. A worker that is stopped right after its fork would
    ignore the signal, and be killed after `graceful_timeout`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    while not arbiter.SIG_QUEUE.empty():
        if arbiter.SIG_QUEUE.get() in _STOPPING:
            sys.exit(0)


#: How long a worker that stops waits for post-hooks in delivery (seconds). Another worker repeats
#: those that take longer.
_DRAIN_TIME = 5.0


def _begin(settings: ServerSettings, worker: Any) -> None:
    """Start a worker that is ready to serve."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    # gunicorn calls when_ready before there are workers. So a master's first worker, whose
    # sockets listen already, logs that the server is ready; later ones do not repeat it.
    if worker.age == 1:
        lines = ready_lines(settings, worker.sockets[0].getsockname())
        if settings.log_format is LogFormat.JSON:
            for line in lines:
                log.info("%s", line)
        else:
            print("\n".join(lines), flush=True)


def _end(worker: Any) -> None:
    """Stop a worker whose connections are closed."""
    tus = getattr(getattr(worker, "wsgi", None), "extensions", {}).get("tuswsgi")
    if tus is not None:
        tus.drain(_DRAIN_TIME)
    sentry.stop()
