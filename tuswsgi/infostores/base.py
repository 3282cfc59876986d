"""The contract of info stores: where the records of uploads are kept.

An info store owns what was promised about an upload and its state, and the events that
are to be told to hooks. It never owns the number of bytes. The contract is tested by
``tuswsgi.testing.infostores``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from tuswsgi.hooks.base import Event
from tuswsgi.info import FileInfo, State


class InfoStore(ABC):
    """Keeps one record per upload, and its events.

    A record and the events that come with it are written in one transaction: after a
    crash there are both or neither. What a write returned is what every process reads
    from then on.

    A store that cannot be reached or that is too busy raises ``Unavailable``.
    """

    @abstractmethod
    def prepare(self) -> None:
        """Make ready for use: create directories or tables. May be called again, and by
        several processes at once.

        :raises ConfigurationError: if the store cannot work as it is configured.
        """

    def close(self) -> None:
        """Release what this process holds. The store may be used again afterwards."""

    @abstractmethod
    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        """Write the record of a new upload and its `events`.

        :raises UploadExists: if there is a record with this id, also a tombstone.
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
        return self.save(info.but(state=state, deleted_at=now), events)

    @abstractmethod
    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        """Return up to `limit` records in the order of their ids.

        :param states: the states to look for; ``None`` for all, tombstones included.
        :param after: only ids greater than this one, to go on where a page ended.
        """

    @abstractmethod
    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        """Return up to `limit` ids of unfinished uploads whose ``expires_at`` has come.

        Tombstones are not among them.
        """

    @abstractmethod
    def finals_waiting_for(self, part: str) -> Sequence[str]:
        """Return the ids of ``WAITING`` final uploads that have `part` among their parts."""

    @abstractmethod
    def events(self, id: str) -> Sequence[Event]:
        """Return the events of an upload that are not delivered yet, oldest first."""
