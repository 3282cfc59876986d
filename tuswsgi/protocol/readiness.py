"""Checks whether a server can take uploads now, for load balancers.

Everything that a request needs is checked. The answers are public, so they leave out what may
hold a secret; the log has the details. ``web.monitoring`` serves them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tuswsgi.core.errors import ConfigurationError, StorageFull, TusError
from tuswsgi.hooks.base import Hook
from tuswsgi.observing.cached_check import Probe
from tuswsgi.protocol.uploads import Uploads

log = logging.getLogger(__name__)

#: How long a check may take, and how long its result is valid, in seconds.
_TIMEOUT = 1.0
_FRESH = 1.0

#: How long checks wait for a server that is starting, in seconds.
_START_TIMEOUT = 0.25

_CANNOT_BE_USED = "It cannot be used; the log says why."
_NO_ANSWER = "No answer within a second."
_NOT_STARTED = "It has not begun to work; the log says why."


class Readiness:
    """The checks of one server.

    :param start: starts the server in this process, as its first request does.
    :param hooks: the transports that the server needs.
    """

    def __init__(
        self, uploads: Uploads, start: Callable[[], None], hooks: Sequence[Hook] = ()
    ) -> None:
        self._uploads = uploads
        self._start = start
        checks: dict[str, Callable[[], None]] = {
            "info_store": uploads.infos.check,
            "data_store": uploads.data.check,
            "free_disk": self._check_space,
            "locker": uploads.locker.check,
        }
        checks |= {f"hooks_{hook.name}": hook.check for hook in hooks}
        self._probes = {
            name: Probe(partial(self._find_problem, name, check), _TIMEOUT, _FRESH)
            for name, check in checks.items()
        }
        self._starting = Probe(self._try_start, _START_TIMEOUT, _FRESH)
        #: The problems of each check that were logged since it last succeeded.
        self._logged: dict[str, set[str]] = {name: set() for name in checks}

    def problems(self) -> Mapping[str, str | None]:
        """Return the problem that each check has found, or ``None``, by the name of the check.

        This takes little more than a second at most. Each check runs at most once a second.
        """
        has_started = self._has_started()
        for probe in self._probes.values():
            probe.begin()
        found = {name: self._problem(name, probe) for name, probe in self._probes.items()}
        if self._uploads.readers.is_stopped:
            found["server"] = "It is about to stop."
        elif not has_started and not any(found.values()):
            # Otherwise the other problems say why.
            found["server"] = _NOT_STARTED
        return found

    def _problem(self, name: str, probe: Probe[str | None]) -> str | None:
        try:
            return probe.get()
        except TimeoutError:
            self._log(name, _NO_ANSWER)
            return _NO_ANSWER

    def _has_started(self) -> bool:
        try:
            return self._starting.get()
        except TimeoutError:
            return False

    def _try_start(self) -> bool:
        try:
            self._start()
        except (TusError, ConfigurationError):
            return False  # the other checks find the cause
        return True

    def _find_problem(self, name: str, check: Callable[[], None]) -> str | None:
        problem = None
        cause = None
        try:
            check()
        except StorageFull as error:
            problem = error.message
        except Exception as error:
            problem = _CANNOT_BE_USED
            cause = error
        self._log(name, problem, cause)
        return problem

    def _log(self, name: str, problem: str | None, cause: Exception | None = None) -> None:
        """Log a problem that is new."""
        logged = self._logged[name]
        if problem is None:
            if logged:
                logged.clear()
                log.info("Ready again: %s", name)
            return
        if problem in logged:
            return
        logged.add(problem)
        known = isinstance(cause, (TusError, OSError, ConfigurationError))
        reason = getattr(cause, "__cause__", None) or cause
        text = problem if reason is None else f"{type(reason).__name__}: {reason}"
        log.warning("Not ready: %s: %s", name, text, exc_info=None if known else cause)

    def _check_space(self) -> None:
        try:
            free = self._uploads.data.free_space()
        except OSError:
            return  # the check of the data store reports it
        wanted = self._uploads.settings.min_free_disk
        if free is not None and free < wanted:
            raise StorageFull(f"{free} bytes are free, {wanted} are wanted (min_free_disk).")
