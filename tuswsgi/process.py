"""State that lives and dies with one process.

A server imports the application and then forks its workers. Connections, sockets and
greenlets do not survive that, so whatever owns one keeps it in a ``PerProcess``, which
makes it at its first use in each process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


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
