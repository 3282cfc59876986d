"""State that lives and dies with one process, and work that would stop all of it.

A server imports the application and then forks its workers. Connections, sockets and
greenlets do not survive that, so whatever owns one keeps it in a ``PerProcess``, which
makes it at its first use in each process. And where all requests share one thread, a call
that the kernel takes long for belongs elsewhere: ``run_in_thread`` runs it there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class PerProcess(Generic[T]):
    """A value that is made at its first use in this process.

    :param factory: makes the value.
    """

    def __init__(self, factory: Callable[[], T]) -> None:
        self._factory = factory
        self._held: tuple[object, T] | None = None
        self._lock: tuple[object, threading.Lock] | None = None

    def get(self) -> T:
        """Return the value of this process."""
        held = self._held
        if held is not None and held[0] is _process:
            return held[1]
        with self._process_lock():
            held = self._held
            if held is None or held[0] is not _process:
                held = self._held = (_process, self._factory())
        return held[1]

    def peek(self) -> T | None:
        """Return this process' value, ``None`` if none was made."""
        held = self._held
        return held[1] if held is not None and held[0] is _process else None

    def pop(self) -> T | None:
        """Forget this process' value and return it, ``None`` if none was made."""
        value = self.peek()
        self._held = None
        return value

    def _process_lock(self) -> threading.Lock:
        # A lock of the parent may have been held, or be of the kind that gevent had
        # not patched yet.
        if self._lock is None or self._lock[0] is not _process:
            self._lock = (_process, threading.Lock())
        return self._lock[1]


#: Stands for this process. Asking the kernel for the pid would cost a call each time.
_process = object()


def _renew() -> None:
    global _process
    _process = object()


os.register_at_fork(after_in_child=_renew)


def let_others_run() -> None:
    """Give every other greenlet its turn, those that wait for sockets too.

    To sleep for 0 seconds does not do that: gevent resumes such sleepers up to 50 times
    before it looks at a socket.
    """
    if not is_cooperative():
        time.sleep(0)
        return
    from gevent import get_hub

    hub = get_hub()
    with hub.loop.timer(0) as timer:
        hub.wait(timer)


def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks in the kernel for long (an fsync, a copy) and return its result.

    Under gevent that is in a thread of its pool, so that other greenlets go on; elsewhere
    it is a plain call. It costs some 50 microseconds. `function` must not touch what belongs
    to greenlets: locks, events, sockets.
    """
    if not is_cooperative():
        return function(*args, **kwargs)
    from gevent import GreenletExit, Timeout, get_hub

    running = get_hub().threadpool.spawn(function, *args, **kwargs)
    try:
        result: T = running.get()
    except BaseException:
        # It still uses what belongs to this greenlet, which may be struck more than once.
        while not running.ready():
            with suppress(GreenletExit, Timeout):
                running.wait()
        raise
    return result


def is_cooperative() -> bool:
    """Whether gevent has patched this process, so that threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))
