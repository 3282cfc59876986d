"""Locks within one process: for tests, and for servers with a single worker.

A forked child starts without locks.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuswsgi.core.errors import UploadInterrupted
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker, ReleaseRequest, request_release


@dataclass(frozen=True, eq=False)
class Held:
    """One acquisition, which is compared by identity."""

    on_release_request: ReleaseRequest | None


class MemoryLocker(Locker[Held]):
    """Exclusive locks among the greenlets and threads of this process.

    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    """

    def __init__(self, lock_timeout: float = 20.0) -> None:
        super().__init__(lock_timeout)
        self._holders: PerProcess[dict[str, Held]] = PerProcess(dict)

    def _try_acquire(self, id: str, on_release_request: ReleaseRequest | None) -> Held | None:
        held = Held(on_release_request)
        return held if self._holders.get().setdefault(id, held) is held else None

    def _release(self, id: str, held: Held) -> None:
        holders = self._holders.get()
        if holders.get(id) is held:
            del holders[id]

    def _request_release(self, id: str) -> None:
        held = self._holders.get().get(id)
        if held is not None:
            request_release(held.on_release_request, UploadInterrupted())
