"""The contract of info stores: where the records of uploads are kept.

An info store owns what was promised about an upload and its state, and the events that
are to be told to hooks. It never owns the number of bytes. The contract is tested by
``tuswsgi.testing.infostores``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tuswsgi.core.errors import UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.core.process import let_others_run


@dataclass(frozen=True)
class Census:
    """How many uploads and events there are.

    :param unfinished: uploads that wait for bytes or parts, expired ones included until they
        are removed.
    :param stalled: those of them that wait for bytes, and have waited for long.
    :param pending: events that are to be delivered.
    :param dead: events that were given up.
    :param oldest: when the oldest event that is to be delivered was written, about.
    """

    unfinished: int = 0
    stalled: int = 0
    pending: int = 0
    dead: int = 0
    oldest: float | None = None


#: More events than anybody counts.
_MANY = 100_000

#: The id of no upload.
_NOBODY = "tuswsgi-check"

#: How many records a scan reads before it lets others run.
_PAGE = 100


class InfoStore(ABC):
    """Keeps one record per upload, and its events.

    A record and the events that come with it are written in one transaction: after a
    crash there are both or neither. What a write returned is what every process reads
    from then on.

    :ivar lifetime: for how long a record is kept after it was written last, in seconds, while
        the bytes stay; ``None`` for ever.

    A store that cannot be reached or that is too busy raises ``Unavailable``.
    """

    lifetime: float | None = None

    @property
    def is_forgetful(self) -> bool:
        """Whether records may go by themselves."""
        return self.lifetime is not None

    @abstractmethod
    def prepare(self) -> None:
        """Make ready for use: create directories or tables. May be called again, and by
        several processes at once.

        :raises ConfigurationError: if the store cannot work as it is configured.
        """

    def close(self) -> None:
        """Release what this process holds. The store may be used again afterwards."""

    def check(self) -> None:
        """Find out, at little cost, whether the store can be used now. May be called often.

        :raises Exception: if it cannot.
        """
        try:
            self.load(_NOBODY)
        except UploadNotFound:
            pass

    @abstractmethod
    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        """Write the record of a new upload and its `events`.

        The two errors below are the only ones by which a caller knows that nothing was
        written. After any other exception, ``Unavailable`` or the end of the greenlet, the
        record may be there, now or in a moment: the answer to a commit may have got lost.

        :raises UploadExists: if there is a record with this id, also a tombstone. A store that
            tries again must not take for another's what its first attempt wrote.
        :raises StorageFull: if there is no room for the record.
        """

    @abstractmethod
    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        """Replace the record of an upload and add `events` to its events.

        :returns: `info` with the sequence that the next save must have.
        :raises InfoConflict: if the record's sequence is not `info.sequence`: somebody
            else has written it, and nothing is changed.
        :raises UploadNotFound: if there is no record.
        """

    @abstractmethod
    def load(self, id: str) -> FileInfo:
        """Return the record of an upload or its tombstone.

        :raises UploadNotFound: if there is none.
        """

    def delete(
        self, info: FileInfo, events: Sequence[Event], *, state: State, now: float
    ) -> FileInfo:
        """Turn the record into a tombstone, by which "gone" is told from "never there".

        The tombstone keeps the events that nobody has delivered yet.

        :param state: ``TERMINATED`` or ``EXPIRED``.
        :param now: the time of the deletion.
        """
        return self.save(info.replace(state=state, deleted_at=now), events)

    @abstractmethod
    def forget(self, info: FileInfo) -> bool:
        """Remove a tombstone for good, so that its id was never there.

        That is done only if the record is still this one, by its sequence, is a tombstone,
        and has no events, not even dead ones.

        :returns: whether it was done.
        """

    @abstractmethod
    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        """Return up to `limit` records in the order of their ids.

        :param states: the states to look for; ``None`` for all, tombstones included.
        :param after: only ids greater than this one, to go on where a page ended.
        """

    def scan(self, state: State) -> Iterator[FileInfo]:
        """Yield all records in one state in the order of their ids, and let others run.

        A record that comes into the state or leaves it meanwhile may be among them or not.
        """
        after = ""
        while page := self.list({state}, after=after, limit=_PAGE):
            yield from page
            after = page[-1].id
            let_others_run()

    def usage(self) -> int:
        """Return the sum of what all uploads promise, ``FileInfo.promised``, in bytes.

        Whatever is written before the call and stays counts; what is written meanwhile, may.
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
        """Return up to `limit` ids of unfinished uploads whose ``expires_at`` has come.

        Tombstones are not among them.
        """

    @abstractmethod
    def finals_waiting_for(self, part: str) -> Sequence[str]:
        """Return the ids of ``WAITING`` final uploads that have `part` among their parts."""

    def census(self, stalled_before: float) -> Census:
        """Count uploads and events, for monitoring; other greenlets go on meanwhile.

        A store that can count without reading all of them does.

        :param stalled_before: an upload is stalled whose last byte, or whose creation if there
            was none, was not later than this.
        """
        unfinished = stalled = 0
        after = ""
        while page := self.list({State.RECEIVING, State.WAITING}, after=after):
            unfinished += len(page)
            stalled += sum(is_stalled(info, stalled_before) for info in page)
            after = page[-1].id
            let_others_run()
        pending = self.outbox(dead=False, limit=_MANY)
        dead = self.outbox(dead=True, limit=_MANY)
        oldest = pending[0].created_at if pending else None
        return Census(unfinished, stalled, len(pending), len(dead), oldest)

    # Events are kept until somebody delivered them. Whoever is about to do so claims
    # them for a while: a claim that ran out, because its process died, is nobody's.

    @abstractmethod
    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        """Return the events of an upload that are not delivered yet, in their order.

        That is the order of their sequence, and where that is equal, of their writing.

        :param dead: those that were given up, instead of those that are to be delivered.
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

        Of each upload and transport only the first event that is not dead can be claimed,
        and only if it is due and no claim on it holds: so an event is delivered after
        those before it, and by one process at a time. Two processes that claim at once
        get different events.

        :param upload: only events of this upload.
        :param transport: only events of this transport, so that a slow one holds up no
            other.
        :param limit: how many events at most; the oldest first, about.
        """

    @abstractmethod
    def renew(self, worker: str, until: float) -> None:
        """Let all claims of `worker` end at `until` instead, also those that ran out and that
        nobody else has taken. A time that has passed gives them up; who gave up claims does
        not renew by that name again.
        """

    @abstractmethod
    def settle(self, event: Event) -> None:
        """Forget an event: it was delivered, or there is no need to. One that is not there
        any more is no error.
        """

    @abstractmethod
    def put_back(self, event: Event) -> None:
        """Replace an event by itself with another ``due_at``, ``attempts``, ``error`` or
        ``dead``, and give up the claim on it. One that is not there is no error.
        """

    @abstractmethod
    def outbox(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        """Return up to `limit` events of all uploads, oldest first.

        :param dead: those that were given up, instead of those that are to be delivered.
        """


def is_stalled(info: FileInfo, before: float) -> bool:
    """Whether an unfinished upload waits for bytes of which the last one came before a time."""
    return info.state is State.RECEIVING and (info.last_byte_at or info.created_at) <= before


@contextmanager
def prepared(infos: InfoStore) -> Iterator[InfoStore]:
    """Prepare a store for the length of a ``with`` block, for who uses it beside a server.

    :raises ConfigurationError: as ``prepare``.
    """
    infos.prepare()
    try:
        yield infos
    finally:
        infos.close()


def first_events(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the first event of each transport that is not dead.

    :param events: those of one upload, in their order.
    """
    seen = set()
    for event in events:
        if not event.dead and event.transport not in seen:
            seen.add(event.transport)
            yield event
