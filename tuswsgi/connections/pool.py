"""A bounded number of connections to one server, shared by all greenlets of a process.

This file owns who may use a connection and how long one waits for it. What a connection is,
and when one is broken, is the business of the modules beside it.
"""

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
    """Connections of one process; the one that was used last is used next.

    :param make: opens a connection, or makes one that opens itself.
    :param close: closes one.
    """

    def __init__(
        self, settings: PoolSettings, make: Callable[[], T], close: Callable[[T], object]
    ) -> None:
        self._timeout = settings.pool_timeout
        self._make = make
        self._close = close
        self._free: list[T] = []
        self._places = threading.Semaphore(settings.pool_size)
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[T]:
        """Use a connection for the length of a ``with`` block.

        :raises Unavailable: if none becomes free in time.
        """
        if not self._places.acquire(timeout=self._timeout):
            log.error("All connections were in use for %.3g s", self._timeout)
            raise Unavailable
        try:
            used = self._free.pop() if self._free else self._make()
            try:
                yield used
            finally:
                if self._closed:
                    self._close(used)
                else:
                    self._free.append(used)
        finally:
            self._places.release()

    def close(self) -> None:
        """Close all connections, those in use as soon as they are not."""
        self._closed = True
        while self._free:
            self._close(self._free.pop())
