"""Calls a function that may hang, with a timeout, and caches its result for a moment.

Concurrent callers share one call, so that frequent health checks cost little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tuswsgi.core.process import PerProcess

T = TypeVar("T")


@dataclass(eq=False)
class _Call(Generic[T]):
    """One call, with its begin and end on the monotonic clock."""

    future: futures.Future[T] = field(default_factory=futures.Future)
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None


@dataclass(eq=False)
class _State(Generic[T]):
    """The last call of this process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    last: _Call[T] | None = None


class Probe(Generic[T]):
    """A function with a timeout and a cached result.

    :param function: called in a thread of its own (a greenlet if gevent has patched threads),
        never two at once: while a call hangs, no other is started.
    :param patience: seconds until ``get`` gives up.
    :param fresh: seconds for which a result is reused.
    """

    def __init__(self, function: Callable[[], T], patience: float, fresh: float) -> None:
        self._function = function
        self._patience = patience
        self._fresh = fresh
        self._state: PerProcess[_State[T]] = PerProcess(_State)

    def begin(self) -> None:
        """Start a call, unless one is running or its result is fresh. It does not wait."""
        self._call()

    def get(self) -> T:
        """Return the result of the last call.

        :raises TimeoutError: if it takes too long.
        :raises Exception: what the function raised.
        """
        call = self._call()
        left = call.began + self._patience - time.monotonic()
        try:
            return call.future.result(max(0.0, left))
        except futures.TimeoutError:
            raise TimeoutError from None

    def _call(self) -> _Call[T]:
        state = self._state.get()
        with state.lock:
            last = state.last
            if last is not None and (
                last.ended is None or time.monotonic() - last.ended < self._fresh
            ):
                return last
            call = state.last = _Call()
        threading.Thread(target=self._run, args=(call,), name="tuswsgi-probe", daemon=True).start()
        return call

    def _run(self, call: _Call[T]) -> None:
        try:
            call.future.set_result(self._function())
        except BaseException as error:
            call.future.set_exception(error)
        finally:
            call.ended = time.monotonic()
