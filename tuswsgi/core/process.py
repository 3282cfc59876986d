"""State that belongs to one process, and calls that would block all of its greenlets.

A server imports the application and then forks its workers. Connections, sockets and
greenlets do not survive a fork, so their owner keeps them in a ``PerProcess``, which makes
them at their first use in each process. ``run_in_thread`` keeps slow system calls from
blocking the greenlets that share a thread.
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
        """Return the value of this process, ``None`` if there is none yet."""
        held = self._held
        return held[1] if held is not None and held[0] is _process else None

    def pop(self) -> T | None:
        """Remove the value of this process and return it, ``None`` if there is none yet."""
        value = self.peek()
        self._held = None
        return value

    def _process_lock(self) -> threading.Lock:
        # A lock of the parent may be held for ever, or was made before gevent patched locks.
        if self._lock is None or self._lock[0] is not _process:
            self._lock = (_process, threading.Lock())
        return self._lock[1]


#: Identifies this process. ``os.getpid`` would cost a system call each time.
_process = object()


def _renew() -> None:
    global _process
    _process = object()


os.register_at_fork(after_in_child=_renew)


def let_others_run() -> None:
    """Yield to every other greenlet, including those that wait for sockets.

    ``sleep(0)`` would not do: gevent resumes such sleepers up to 50 times before it looks at
    a socket.
    """
    if not is_cooperative():
        time.sleep(0)
        return
    from gevent import get_hub

    hub = get_hub()
    with hub.loop.timer(0) as timer:
        hub.wait(timer)


def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function that blocks in the kernel (an fsync, a copy) and return its result.

    Under gevent it runs in the hub's thread pool, so that other greenlets go on; elsewhere
    it is a plain call. The detour costs some 50 microseconds. `function` must not use
    objects that belong to greenlets: locks, events, sockets.
    """
    if not is_cooperative():
        return function(*args, **kwargs)
    from gevent import GreenletExit, Timeout, get_hub

    running = get_hub().threadpool.spawn(function, *args, **kwargs)
    try:
        result: T = running.get()
    except BaseException:
        # The function still uses objects of this greenlet, which may be killed more than once.
        while not running.ready():
            with suppress(GreenletExit, Timeout):
                running.wait()
        raise
    return result


def is_cooperative() -> bool:
    """Whether gevent has patched this process, so that threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))
