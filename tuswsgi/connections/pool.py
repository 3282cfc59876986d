"""A bounded pool of connections to one server, shared by all greenlets of a process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from tuswsgi.core.errors import Unavailable
from tuswsgi.core.options import Duration, option

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class PoolSettings:
    """How many connections a worker has to a database server or to Redis."""

    pool_size: int = option(
        10, "How many connections to one server of records or locks a worker opens at most."
    )
    pool_timeout: float = option(
        5.0,
        "How long a request waits for such a connection, and for its server (503 after that).",
        kind=Duration,
    )


class Pool(Generic[T]):
    """The connections of one process; the most recently used one is used next.

    :param make: makes a connection, which may open later.
    :param close: closes a connection.
    """

    def __init__(
        self, settings: PoolSettings, make: Callable[[], T], close: Callable[[T], object]
    ) -> None:
        self._timeout = settings.pool_timeout
        self._make = make
        self._close = close
        self._idle: list[T] = []
        self._slots = threading.Semaphore(settings.pool_size)
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[T]:
        """Use a connection during a ``with`` block.

        :raises Unavailable: if all connections are in use until the timeout.
        """
        if not self._slots.acquire(timeout=self._timeout):
            log.error("All connections were in use for %.3g s", self._timeout)
            raise Unavailable
        try:
            used = self._idle.pop() if self._idle else self._make()
            try:
                yield used
            finally:
                if self._closed:
                    self._close(used)
                else:
                    self._idle.append(used)
        finally:
            self._slots.release()

    def close(self) -> None:
        """Close all connections; those in use are closed after their use."""
        self._closed = True
        while self._idle:
            self._close(self._idle.pop())
