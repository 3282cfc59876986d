"""The server, put together from backends, settings and hooks.

``Tus`` makes blueprints for a Flask application; ``create_app`` returns an application that is
nothing but a tus server.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, cast

import flask
from flask.sansio.blueprints import BlueprintSetupState

from tuswsgi.config import runtime
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.config.server import ServerSettings
from tuswsgi.core.errors import ConfigurationError, TusError, Unavailable
from tuswsgi.core.events import HookName, HookType
from tuswsgi.core.process import PerProcess
from tuswsgi.datastores.base import DataStore
from tuswsgi.hooks.base import Hook
from tuswsgi.hooks.callable import CallableHook, HookFunction
from tuswsgi.hooks.manager import HookManager
from tuswsgi.hooks.settings import EnabledHooks, HookSettings
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.settings import LockerName
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.outbox.settings import DeliverySettings
from tuswsgi.protocol.cleanup import CleanUpSettings
from tuswsgi.protocol.context import Context
from tuswsgi.protocol.quota import QuotaSettings
from tuswsgi.protocol.readiness import Readiness
from tuswsgi.protocol.settings import UploadSettings
from tuswsgi.protocol.sweep import Sweeper
from tuswsgi.protocol.uploads import Uploads
from tuswsgi.web.blueprint import OwnerFunction, TusBlueprint
from tuswsgi.web.functions import Caller
from tuswsgi.web.monitoring import MonitoringBlueprint
from tuswsgi.web.settings import MonitoringSettings, WebSettings

if TYPE_CHECKING:
    from tuswsgi.metrics import Metrics

log = logging.getLogger(__name__)

#: Seconds between a failed start and the next attempt.
_START_PAUSE = 1.0

_count = itertools.count(1)


class Tus:
    """A tus server that lives in a Flask application.

    ::

        tus = Tus(data_dir="uploads", max_file_size="5GB")
        app.register_blueprint(tus.blueprint(), url_prefix="/files")

    :param config: the configuration; without one it is made of `options`.
    :param data_store: a store of your own instead of the configured one; likewise
        `info_store` and `locker`.
    :param hooks: transports of your own, which are asked before the configured ones; or the
        value of the option of this name.
    :param owner: returns the user who sends a request. An upload is visible only to the user who
        created it.
    :param name: the blueprint's name; unique by default.
    :param options: any option of the reference, e.g. ``max_file_size``.
    :raises ConfigurationError: if the options are wrong.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        data_store: DataStore | None = None,
        info_store: InfoStore | None = None,
        locker: Locker[Any] | LockerName | str | None = None,
        hooks: Iterable[Hook] | Iterable[HookType] | str | None = None,
        owner: OwnerFunction | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if locker is not None and not isinstance(locker, Locker):
            # The name of a built-in locker, as the option has it.
            options["locker"] = locker
            locker = None
        own_hooks = [] if hooks is None else [hook for hook in hooks if isinstance(hook, Hook)]
        if hooks is not None and not own_hooks:
            options["hooks"] = hooks
        if config is not None and options:
            raise TypeError(f"A config has these already: {', '.join(options)}")
        config = config or Config.load(keywords=options)
        self.config = config
        backends = Backends(config)
        infos = info_store or backends.info_store()
        is_own = locker is None
        locker = locker or backends.locker()
        data = data_store or backends.data_store()
        self.hooks = self._make_hooks(own_hooks, data)
        self._outbox = Outbox(
            infos,
            self.hooks,
            config.build(DeliverySettings),
            lambda hook, answer: self.uploads.answered(hook, answer),
        )
        settings = config.build(UploadSettings)
        context = Context(data, infos, locker, self.hooks, self._outbox, settings, sender=self)
        self.uploads = Uploads(context, config.build(QuotaSettings))
        self._sweeper = PerProcess(lambda: Sweeper(self.uploads, config.build(CleanUpSettings)))
        self._caller = Caller()
        self._functions = CallableHook(self._caller)
        self._owner = owner
        number = next(_count)
        #: The blueprint's name.
        self.name = name or ("tus" if number == 1 else f"tus_{number}")
        self._started = PerProcess(self._start)
        self._registration: PerProcess[runtime.Registration] | None = None
        if is_own and runtime.uses_registration(config):
            self._registration = PerProcess(lambda: runtime.Registration(config))
        #: ``None`` if they are switched off.
        self.metrics = self._make_metrics()
        self._start_again_at = 0.0

    def blueprint(self, methods: Collection[str] | None = None) -> TusBlueprint:
        """Return a blueprint with the server's routes, to be registered under any prefix.

        :param methods: the methods that it serves, e.g. ``["POST", "HEAD", "PATCH",
            "OPTIONS"]``; by default all. The application may have rules of its own for other
            methods of the same URLs.
        """
        blueprint = TusBlueprint(
            self.name,
            self.uploads,
            self.config.build(WebSettings),
            owner=self._owner,
            start=self._started.get,
            methods=methods,
            shows_request_id=self.config.build(ServerSettings).access_log,
        )
        blueprint.record(self._set_app)
        return blueprint

    def _set_app(self, state: BlueprintSetupState) -> None:
        self._caller.app = cast(flask.Flask, state.app)

    def monitoring_blueprint(self) -> MonitoringBlueprint:
        """Return a blueprint with `/health`, `/ready` and, if metrics are on, `/metrics`.

        `/health` tells that the process responds, and `/ready` whether it can accept uploads.
        The metrics are the sums of all workers if the environment variable
        ``PROMETHEUS_MULTIPROC_DIR`` names a directory that was empty at the start, as it does with
        our settings for gunicorn; otherwise they are those of one process.
        """
        needed = []
        if self.config.build(MonitoringSettings).ready_needs_hooks:
            needed = self.hooks.hooks
        readiness = Readiness(self.uploads, self.start, needed)
        exposition = None if self.metrics is None else self.metrics.exposition
        return MonitoringBlueprint(f"{self.name}_monitoring", readiness, exposition)

    def _make_metrics(self) -> Metrics | None:
        if not self.config.build(MonitoringSettings).metrics:
            return None
        from tuswsgi.metrics import Metrics

        return Metrics(self.uploads, self.start)

    def _make_hooks(self, own: list[Hook], data: DataStore) -> HookManager:
        hooks = [*own, *Backends(self.config).hooks()]
        names = [hook.name for hook in hooks]
        for name in set(names):
            if names.count(name) > 1:
                raise ConfigurationError(f"Two transports of hooks have the name {name}.")
        for hook in own:
            hook.types = hook.types or frozenset(self.config.build(EnabledHooks).hooks)
        return HookManager(hooks, self.config.build(HookSettings), data.location)

    def on(self, event: HookName) -> Callable[[HookFunction], HookFunction]:
        """Decorate a function that handles a hook, e.g. ``pre-create``.

        It gets a ``HookRequest`` and returns a ``HookResponse`` or ``None``.

        A blocking hook refuses the request by its answer, or by ``flask.abort()`` and any other
        ``HTTPException``, which becomes the response. Any other exception is answered with 503, so
        that the client tries again, and any other return value with 500.

        Other hooks are called in the application's context, after their change was saved, perhaps
        in another worker, and again if the function raises.

        :raises ValueError: if there is no such hook.
        """
        type = HookType(event)

        def add(function: HookFunction) -> HookFunction:
            self._functions.add(type, function)
            if self._functions not in self.hooks.hooks:
                self.hooks.hooks.insert(0, self._functions)
                if self._started.peek():
                    self._outbox.start()
            return function

        return add

    def stop(self, id: str) -> bool:
        """Terminate an unfinished upload, also while another worker receives it.

        :returns: whether it was terminated; finished uploads stay.
        :raises UploadNotFound: if there is no such upload.
        :raises UploadLocked: if the request that holds it did not release it in time.
        """
        self.start()
        return self.uploads.stop(id)

    def start(self) -> None:
        """Prepare the backends, and start the cleanup and the delivery of hooks, in this process.

        Every request calls it; a server calls it before, to notice problems early. After a
        failure the next call tries again.

        :raises ConfigurationError: if a backend cannot work with its configuration.
        :raises Unavailable: if a backend cannot be reached.
        """
        self._started.get()

    @property
    def is_started(self) -> bool:
        """Whether ``start`` has succeeded in this process."""
        return self._started.peek() is not None

    def drain(self, timeout: float = 10.0) -> None:
        """Stop the cleanup, start no more deliveries and wait for those in progress.

        Other workers, or the next ones, deliver the rest. May be called more than once.

        :param timeout: in seconds.
        """
        if (sweeper := self._sweeper.peek()) is not None:
            sweeper.stop()
        self._outbox.stop(timeout)

    def stop_uploads(self) -> None:
        """Interrupt all requests that upload bytes, now and from now on.

        The bytes that have arrived are kept, and clients get a 503, after which they resume. It is
        safe in a signal handler.
        """
        self.uploads.readers.stop()

    def stop_on_sigterm(self) -> None:
        """Call ``stop_uploads`` at SIGTERM, and then the previous handler.

        gunicorn does not tell applications that a worker is to stop, and kills a worker that still
        waits for a body in the end. Call this in the worker's main thread, e.g. in
        ``post_worker_init``.
        """
        previous = signal.getsignal(signal.SIGTERM)

        def handle(signum: int, frame: Any) -> None:
            self.stop_uploads()
            if callable(previous):
                previous(signum, frame)
            elif previous == signal.SIG_DFL:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)

        signal.signal(signal.SIGTERM, handle)

    def _start(self) -> bool:
        if time.monotonic() < self._start_again_at:
            # Requests that waited for the failed attempt would otherwise try one by one.
            raise Unavailable
        try:
            self.prepare()
            self._register_runtime_dir()
        except TusError:
            self._start_again_at = time.monotonic() + _START_PAUSE
            raise
        if self.hooks.hooks:
            self._outbox.start()
        threading.Thread(target=self._sweep, name="tuswsgi-sweep", daemon=True).start()
        return True

    def _register_runtime_dir(self) -> None:
        if self._registration is not None:
            try:
                self._registration.get()
            except OSError as error:
                log.warning("Commands beside this server will not find its locks: %s", error)

    def prepare(self) -> None:
        """Prepare the backends only, for a program beside the servers.

        Post-hooks that are kept in a store are left to the servers; others are sent from this
        process, until ``drain``.

        :raises ConfigurationError: as ``start``.
        :raises Unavailable: as ``start``.
        """
        backends: list[DataStore | InfoStore | Locker[Any] | Hook]
        backends = [self.uploads.data, self.uploads.infos, self.uploads.locker, *self.hooks.hooks]
        failures: list[Exception] = []
        for backend in backends:
            try:
                backend.prepare()
            except (TusError, ConfigurationError) as error:
                failures.append(error)
        if failures:
            # A configuration error does not pass, so it comes first.
            raise min(failures, key=lambda error: isinstance(error, TusError))
        if self.hooks.hooks and not self._outbox.keeps_events:
            self._outbox.start()

    def _sweep(self) -> None:
        self._sweeper.get().run()


def create_app(config: Config | None = None) -> flask.Flask:
    """Return a Flask application that serves uploads at the configured URL.

    If uploads are at ``/``, ``/health`` and ``/ready`` still work. Functions, signals and rules
    that are added to the application are called for uploads, too.

    :param config: the configuration; by default that of the environment.
    :raises ConfigurationError: if it is wrong.
    """
    config = config or Config.from_environment(os.environ)
    app = flask.Flask("tuswsgi", static_folder=None)
    tus = Tus(config, name="tus")
    url = "/" + config.build(ServerSettings).url.strip("/")
    app.register_blueprint(tus.monitoring_blueprint())
    app.register_blueprint(tus.blueprint(), url_prefix=url)
    app.extensions["tuswsgi"] = tus
    return app
