"""Looks at something that may hang, without hanging with it.

Whoever asks waits for a bounded time, all who ask at once share one look, and for a moment
its result is good for those who come later: however often somebody asks, little is done.
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
class _Look(Generic[T]):
    """One look, and when it began and ended, on the monotonic clock."""

    future: futures.Future[T] = field(default_factory=futures.Future)
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None


@dataclass(eq=False)
class _State(Generic[T]):
    """What one process knows."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    last: _Look[T] | None = None


class Probe(Generic[T]):
    """A function whose result is wanted soon and need not be new.

    :param function: is called in a thread (a greenlet where gevent has patched) of its own;
        while a call of it hangs, there is no other one.
    :param patience: how long a call may take, in seconds.
    :param fresh: for how many seconds a result is good.
    """

    def __init__(self, function: Callable[[], T], patience: float, fresh: float) -> None:
        self._function = function
        self._patience = patience
        self._fresh = fresh
        self._state: PerProcess[_State[T]] = PerProcess(_State)

    def begin(self) -> None:
        """Call the function now, if that is needed, without waiting for it."""
        self._look()

    def get(self) -> T:
        """Return what the function returned a moment ago.

        :raises TimeoutError: if it takes too long.
        :raises Exception: what the function raised.
        """
        look = self._look()
        left = look.began + self._patience - time.monotonic()
        try:
            return look.future.result(max(0.0, left))
        except futures.TimeoutError:
            raise TimeoutError from None

    def _look(self) -> _Look[T]:
        state = self._state.get()
        with state.lock:
            last = state.last
            if last is not None and (
                last.ended is None or time.monotonic() - last.ended < self._fresh
            ):
                return last
            look = state.last = _Look()
        threading.Thread(target=self._run, args=(look,), name="tuswsgi-probe", daemon=True).start()
        return look

    def _run(self, look: _Look[T]) -> None:
        try:
            look.future.set_result(self._function())
        except BaseException as error:
            look.future.set_exception(error)
        finally:
            look.ended = time.monotonic()
