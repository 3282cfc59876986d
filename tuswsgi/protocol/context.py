"""The stores, settings and hooks of one server, and what all operations on uploads share."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from tuswsgi.core.errors import StorageFull, TusError, UploadNotFound
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.extensions import Extension
from tuswsgi.core.info import MAX_SIZE, FileInfo, State
from tuswsgi.datastores.base import DataStore
from tuswsgi.hooks.manager import HookManager
from tuswsgi.infostores.base import InfoStore
from tuswsgi.lockers.base import Hold, Locker
from tuswsgi.observing.signals import tell, upload_terminated
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.protocol.settings import UploadSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What every operation on uploads works with.

    :param locker: grants the right to write an upload, among all processes.
    :param sender: the sender of signals, a ``Tus``.
    """

    data: DataStore
    infos: InfoStore
    locker: Locker[Any]
    hooks: HookManager
    outbox: Outbox
    settings: UploadSettings
    sender: object = None

    @cached_property
    def extensions(self) -> tuple[Extension, ...]:
        """The extensions that this server offers."""
        return self.settings.offered(self.data.extensions)

    @cached_property
    def expiration(self) -> float | None:
        """Seconds that an unfinished upload lives after its last byte; ``None`` for ever."""
        offered = Extension.EXPIRATION in self.settings.tus_extensions
        return self.settings.expiration if offered else None

    @cached_property
    def max_file_size(self) -> int:
        """The size of the largest upload, in bytes."""
        largest = self.settings.max_file_size
        return MAX_SIZE if largest is None else largest

    def expires_at(self, now: float) -> float | None:
        """Return when an upload expires whose last byte arrived at `now`."""
        return None if self.expiration is None else now + self.expiration

    def find(self, id: str) -> FileInfo | None:
        """Return the record of an upload or its tombstone, ``None`` if there is none."""
        try:
            return self.infos.load(id)
        except UploadNotFound:
            return None

    def check_free_space(self, info: FileInfo) -> None:
        """Check that `min_free_disk` stays free once all bytes of an upload are stored.

        :raises StorageFull: if it does not.
        """
        free = self.data.free_space()
        if free is not None and free - (info.size or 0) < self.settings.min_free_disk:
            raise StorageFull

    def remove(self, info: FileInfo, state: State, request: RequestInfo, hold: Hold) -> FileInfo:
        """Delete the bytes of an upload and turn its record into a tombstone, which is returned.

        The tombstone comes first: a process that lost the lock cannot write it, and must not
        delete bytes that a client may have been told of since. If the process dies in between,
        the clean-up deletes the bytes.

        :param state: ``TERMINATED`` or ``EXPIRED``.
        :param hold: the upload's lock.
        """
        events = self.outbox.events_for(HookType.POST_TERMINATE, info, request)
        write_tombstone = partial(self.infos.delete, info, events, state=state, now=time.time())
        hold.check()
        try:
            info = write_tombstone()
        except StorageFull:
            # The bytes make room for the tombstone.
            hold.check()
            self.data.delete(info)
            info = write_tombstone()
        try:
            hold.check()
            self.data.delete(info)
        except TusError as error:
            log.warning("The bytes of %s are left to the clean-up: %s", info.id, error)
        except Exception:
            log.exception("The bytes of %s could not be removed; the clean-up tries again", info.id)
        self.outbox.tell(HookType.POST_TERMINATE, info, request)
        tell(upload_terminated, self.sender, info)
        return info
