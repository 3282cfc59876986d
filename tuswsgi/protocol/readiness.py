"""Whether a server can take uploads now: what a load balancer wants to know of it.

It looks at everything that a request needs and says what is wrong in words for everybody:
what they leave out, because it may hold a secret, is in the log. How that is answered is the
business of ``web.monitoring``.
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

#: How long a check may take, and for how long its result is good (seconds).
_PATIENCE = 1.0
_FRESH = 1.0

#: How long checks wait for a server that is about to begin (seconds).
_START_PATIENCE = 0.25

_CANNOT_BE_USED = "It cannot be used; the log says why."
_NO_ANSWER = "No answer within a second."
_NOT_BEGUN = "It has not begun to work; the log says why."


class Readiness:
    """The checks of one server.

    :param start: makes the server ready in this process, as its first request does.
    :param hooks: the transports without which the server is not ready.
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
            name: Probe(partial(self._find_problem, name, check), _PATIENCE, _FRESH)
            for name, check in checks.items()
        }
        self._beginning = Probe(self._begin, _START_PATIENCE, _FRESH)
        #: What the log has of each check since it was well.
        self._told: dict[str, set[str]] = {name: set() for name in checks}

    def problems(self) -> Mapping[str, str | None]:
        """Return what is wrong, ``None`` for what is not, by the name of the check.

        It takes little more than a second at most, and does something once a second at most.
        """
        has_begun = self._has_begun()
        for probe in self._probes.values():
            probe.begin()
        found = {name: self._problem(name, probe) for name, probe in self._probes.items()}
        if self._uploads.readers.is_stopped:
            found["server"] = "It is about to stop."
        elif not has_begun and not any(found.values()):
            # Otherwise it is known what it waits for.
            found["server"] = _NOT_BEGUN
        return found

    def _problem(self, name: str, probe: Probe[str | None]) -> str | None:
        try:
            return probe.get()
        except TimeoutError:
            self._tell(name, _NO_ANSWER)
            return _NO_ANSWER

    def _has_begun(self) -> bool:
        try:
            return self._beginning.get()
        except TimeoutError:
            return False

    def _begin(self) -> bool:
        try:
            self._start()
        except (TusError, ConfigurationError):
            return False  # the checks find out which part it is
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
        self._tell(name, problem, cause)
        return problem

    def _tell(self, name: str, problem: str | None, cause: Exception | None = None) -> None:
        """Log what is news."""
        told = self._told[name]
        if problem is None:
            if told:
                told.clear()
                log.info("Ready again: %s", name)
            return
        if problem in told:
            return
        told.add(problem)
        known = isinstance(cause, (TusError, OSError, ConfigurationError))
        reason = getattr(cause, "__cause__", None) or cause
        text = problem if reason is None else f"{type(reason).__name__}: {reason}"
        log.warning("Not ready: %s: %s", name, text, exc_info=None if known else cause)

    def _check_space(self) -> None:
        try:
            free = self._uploads.data.free_space()
        except OSError:
            return  # that there is no directory is the data store's fault
        wanted = self._uploads.settings.min_free_disk
        if free is not None and free < wanted:
            raise StorageFull(f"{free} bytes are free, {wanted} are wanted (min_free_disk).")
