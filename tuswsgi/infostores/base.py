"""The contract of info stores, which keep the records of uploads and their events.

A record says what was promised about an upload and what state it is in, but not how many
bytes there are: only the data store knows that. An event is a post-hook to be delivered. The
contract is tested by ``tuswsgi.testing.infostores``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tuswsgi.core.errors import UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.core.process import let_others_run

#: How many records a scan reads before it lets other greenlets run.
_PAGE = 100

#: More events than there ever are.
_MANY = 100_000

#: An id that no upload has.
_UNUSED_ID = "tuswsgi-check"


class RecordStore(ABC):
    """Keeps one record per upload.

    A record and the events that are passed with it are written in one transaction: after a
    crash both are there, or neither. Once a write has returned, every process reads what it
    wrote. The methods raise ``Unavailable`` if the store cannot be reached or is too busy.

    :ivar lifetime: how long a record is kept after its last write, in seconds, whether or not
        the upload's bytes stay; ``None`` for ever.
    """

    lifetime: float | None = None

    @abstractmethod
    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        """Write the record of a new upload and its `events`.

        Only the two errors below tell the caller that nothing was written. After any other
        exception the record may exist, or come to exist in a moment: the answer to a commit
        may be lost, and the greenlet may be killed.

        :raises UploadExists: if there is a record or a tombstone with this id. A store that
            retries must recognize what its own first attempt has written.
        :raises StorageFull: if there is no room for the record.
        """

    @abstractmethod
    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        """Replace the record of an upload and add `events` to its events.

        :returns: `info` with the sequence that the next save must have.
        :raises InfoConflict: if the stored sequence is not `info.sequence`, because the record
            was changed in the meantime. Nothing is written.
        :raises UploadNotFound: if there is no record.
        """

    @abstractmethod
    def load(self, id: str) -> FileInfo:
        """Return the record of an upload, or its tombstone.

        :raises UploadNotFound: if there is neither.
        """

    def delete(
        self, info: FileInfo, events: Sequence[Event], *, state: State, now: float
    ) -> FileInfo:
        """Replace the record by a tombstone, which tells "gone" from "never existed".

        The tombstone keeps the undelivered events.

        :param state: ``TERMINATED`` or ``EXPIRED``.
        :param now: the time of the deletion.
        """
        return self.save(info.replace(state=state, deleted_at=now), events)

    @abstractmethod
    def forget(self, info: FileInfo) -> bool:
        """Remove a tombstone, so that its id is unknown again.

        Nothing is removed unless the stored record has the sequence of `info`, is a tombstone
        and has no events, not even dead ones.

        :returns: whether it was removed.
        """

    @abstractmethod
    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        """Return up to `limit` records in the order of their ids.

        :param states: the states to look for; ``None`` for all, tombstones included.
        :param after: only ids greater than this one, to continue after a page.
        """

    def scan(self, state: State) -> Iterator[FileInfo]:
        """Yield all records in a state in the order of their ids, and let other greenlets run.

        Records that enter or leave the state meanwhile may be included or not.
        """
        after = ""
        while page := self.list({state}, after=after, limit=_PAGE):
            yield from page
            after = page[-1].id
            let_others_run()

    def usage(self) -> int:
        """Return the sum of ``FileInfo.promised`` of all uploads, in bytes.

        Records that are written meanwhile may count or not.
        """
        total = 0
        after = ""
        while page := self.list(after=after, limit=_PAGE):
            total += sum(info.promised for info in page)
            after = page[-1].id
            let_others_run()
        return total

    @abstractmethod
    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        """Return up to `limit` ids of unfinished uploads whose ``expires_at`` is not after `now`.

        Tombstones are not included.
        """

    @abstractmethod
    def finals_waiting_for(self, part: str) -> Sequence[str]:
        """Return the ids of ``WAITING`` final uploads that have `part` among their parts."""


class EventStore(ABC):
    """Keeps the events of uploads until they are delivered.

    A process that is about to deliver an event claims it for a while. The claims of a process
    that has died expire, and others can claim the events.
    """

    @abstractmethod
    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        """Return the undelivered events of an upload in the order of their delivery.

        That is the order of their sequence and, where that is equal, of their writing. An
        unknown upload has none.

        :param dead: return the dead letters instead.
        """

    @abstractmethod
    def claim(
        self,
        worker: str,
        now: float,
        until: float,
        *,
        upload: str | None = None,
        transport: str | None = None,
        limit: int = 100,
    ) -> Sequence[Event]:
        """Claim events for `worker` until the time `until`, and return them.

        Of each upload and transport only the first event that is not dead can be claimed, if it
        is due and not claimed already. So the events are delivered one after the other, each by
        one process at a time. Workers that claim at the same time get different events.

        :param upload: claim only events of this upload.
        :param transport: claim only events of this transport.
        :param limit: the most events to claim; those that are due longest come first, roughly.
        """

    @abstractmethod
    def renew(self, worker: str, until: float) -> None:
        """Extend all claims of `worker` until `until`, expired ones too unless another worker
        has claimed the event since.

        A time in the past releases the claims; the worker then never renews again.
        """

    @abstractmethod
    def settle(self, event: Event) -> None:
        """Remove an event that was delivered or is obsolete. An unknown one is ignored."""

    @abstractmethod
    def put_back(self, event: Event) -> None:
        """Update the ``due_at``, ``attempts``, ``error`` and ``dead`` of an event, and release
        the claim on it. An unknown one is ignored.
        """

    @abstractmethod
    def undelivered(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        """Return up to `limit` undelivered events of all uploads, oldest first.

        :param dead: return the dead letters instead.
        """


@dataclass(frozen=True)
class Census:
    """How many uploads and events there are.

    :param unfinished: uploads that wait for bytes or parts, including expired ones that are
        not removed yet.
    :param stalled: those of them that have not received a byte for a long time.
    :param pending: events to be delivered.
    :param dead: dead letters.
    :param oldest: when the oldest pending event was written, roughly.
    """

    unfinished: int = 0
    stalled: int = 0
    pending: int = 0
    dead: int = 0
    oldest: float | None = None


class InfoStore(RecordStore, EventStore):
    """Keeps the records of uploads and their events. Subclass it for a store of your own."""

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for use: create directories or tables. May be called again, and by several
        processes at once.

        :raises ConfigurationError: if the store cannot work as configured.
        """

    def close(self) -> None:
        """Release what this process holds. The store may be used again afterwards."""

    def check(self) -> None:
        """Check that the store is usable. It is cheap and may be called often.

        :raises Exception: if it is not.
        """
        try:
            self.load(_UNUSED_ID)
        except UploadNotFound:
            pass

    def census(self, stalled_before: float) -> Census:
        """Count uploads and events for monitoring, and let other greenlets run.

        A store should override this if it can count without reading everything.

        :param stalled_before: an upload is stalled if its last byte (its creation if there is
            none) came no later than this.
        """
        unfinished = stalled = 0
        after = ""
        while page := self.list({State.RECEIVING, State.WAITING}, after=after):
            unfinished += len(page)
            stalled += sum(is_stalled(info, stalled_before) for info in page)
            after = page[-1].id
            let_others_run()
        pending = self.undelivered(dead=False, limit=_MANY)
        dead = self.undelivered(dead=True, limit=_MANY)
        oldest = pending[0].created_at if pending else None
        return Census(unfinished, stalled, len(pending), len(dead), oldest)


def is_stalled(info: FileInfo, before: float) -> bool:
    """Return whether an upload waits for bytes and got the last one no later than `before`."""
    return info.state is State.RECEIVING and (info.last_byte_at or info.created_at) <= before


@contextmanager
def prepared(infos: InfoStore) -> Iterator[InfoStore]:
    """Prepare a store for a ``with`` block, and close it afterwards.

    :raises ConfigurationError: as ``prepare``.
    """
    infos.prepare()
    try:
        yield infos
    finally:
        infos.close()
