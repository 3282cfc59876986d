"""Leases that hang together: all locks of a process end with its one session on the server.

Servers like etcd and Consul let keys end with a session that is renewed as a whole, which
costs the same for one lock as for thousands. This file owns the session of each process.
How a session is kept, and what a lock is, a backend knows.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import Unavailable
from tuswsgi.core.process import PerProcess
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.lease import LeaseLocker, clock

#: By how much a session is longer than a lease, so that it need not be renewed for each
#: lock that is taken.
_LONGER = 1.25


class SessionGone(Exception):
    """A session has ended, and the locks with it."""


@dataclass(eq=False)
class Session:
    """A session of this process.

    :ivar renewed_at: since when it runs at the least, on ``clock``.
    :ivar tokens: what holds which lock by it, by the locks' ids.
    :ivar doubtful: tokens that hold nothing as far as this process is concerned, but nobody
        has said so: the lock's id of each, and since when it is so. What the server does with
        them late would be held for as long as this process lives.
    """

    name: str
    renewed_at: float
    tokens: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, tuple[str, float]] = field(default_factory=dict)


class Connection(Protocol):
    """What a backend asks its server by."""

    def check(self) -> None:
        """Find out whether the server lets us in.

        :raises ConfigurationError: if not.
        """

    def close(self) -> None:
        """Close what is open."""


C = TypeVar("C", bound=Connection)


class Sessions:
    """The session of a process, which others may be about to open."""

    def __init__(self) -> None:
        self.present: Session | None = None
        self.opening = threading.Lock()

    def drop(self, session: Session) -> None:
        if self.present is session:
            self.present = None


class SessionLocker(LeaseLocker, Generic[C]):
    """Exclusive locks that a server keeps for as long as a session.

    :param timeout: how long ``lock`` waits for a holder, in seconds.
    :param lease: for how long a lock is held at least after its session was renewed, in
        seconds; the server frees it a quarter later.
    :param patience: how long a request waits for others that open the session, in seconds.
    :param connect: makes the connection of a process; nothing is opened yet.
    """

    # An attempt is a write that most servers of a cluster have to agree on.
    backoff = Backoff(first=0.002, longest=0.1)
    request_pause = 0.25

    def __init__(
        self,
        timeout: float,
        lease: float,
        beside: Locker[Any] | None,
        patience: float,
        connect: Callable[[], C],
    ) -> None:
        super().__init__(timeout, lease, beside)
        self._patience = patience
        self._connection: PerProcess[C] = PerProcess(connect)
        self._sessions: PerProcess[Sessions] = PerProcess(Sessions)

    def prepare(self) -> None:
        super().prepare()
        try:
            self._connection.get().check()
        finally:
            # Whoever prepares may fork then, and connections do not survive that.
            self._disconnect()

    def close(self) -> None:
        super().close()
        self._sessions.pop()
        self._disconnect()

    def _disconnect(self) -> None:
        connection = self._connection.pop()
        if connection is not None:
            connection.close()

    @property
    def session_length(self) -> int:
        """For how many seconds a session lives without being renewed."""
        return math.ceil(self.lease * _LONGER)

    @abstractmethod
    def _open_session(self) -> str:
        """Return the name of a new session that lives for ``session_length``.

        :raises Unavailable: if the server cannot be reached; likewise below.
        """

    @abstractmethod
    def _renew_session(self, session: str) -> bool:
        """Let a session live for its full length again; return whether there is one."""

    @abstractmethod
    def _create(self, session: str, id: str, token: str) -> str | None:
        """Let `token` hold the lock of `id` until the session ends, and return the mark, as
        ``_take`` does. The mark does not end with the session.

        :raises SessionGone: if the session has ended.
        """

    @abstractmethod
    def _remove(self, id: str, token: str) -> None:
        """Free the lock of `id` and remove its mark, as ``_give_back`` does."""

    @abstractmethod
    def _still_there(self, session: str, ids: Collection[str]) -> Collection[str]:
        """Return those of `ids` whose locks are held by a session of this process."""

    @abstractmethod
    def _find(self, id: str) -> tuple[str, str] | None:
        """Return the token that holds the lock of `id`, and its session."""

    @abstractmethod
    def _call(self, worker: str, token: str, session: str) -> None:
        """Let `worker` hear that somebody waits for the lock that `token` holds. What is
        kept of that ends with the session of the holder.
        """

    def _take(self, id: str, token: str) -> str | None:
        try:
            return self._take_in(self._session(), id, token)
        except SessionGone:
            pass  # the next one is new
        try:
            return self._take_in(self._session(), id, token)
        except SessionGone:
            raise Unavailable from None

    def _take_in(self, session: Session, id: str, token: str) -> str | None:
        try:
            mark = self._create(session.name, id, token)
        except SessionGone:
            self._sessions.get().drop(session)
            raise
        except BaseException:
            session.doubtful[token] = id, clock()
            raise
        if mark is not None:
            session.tokens[id] = token
        return mark

    def _give_back(self, id: str, token: str) -> None:
        session = self._sessions.get().present
        if session is not None and session.tokens.get(id) == token:
            del session.tokens[id]
        try:
            self._remove(id, token)
        except BaseException:
            if session is not None:
                session.doubtful[token] = id, clock()
            raise

    def _prolong(self, held: Mapping[str, str]) -> Collection[str]:
        session = self._sessions.get().present
        if session is None or not self._renew(session):
            return ()
        # Those of an earlier session are not among its tokens.
        ids = [id for token, id in held.items() if session.tokens.get(id) == token]
        return {session.tokens.get(id, "") for id in self._still_there(session.name, ids)}

    def _holder(self, id: str) -> str | None:
        found = self._find(id)
        return found[0] if found is not None else None

    def _ask(self, worker: str, id: str, token: str) -> None:
        found = self._find(id)
        if found is not None and found[0] == token:
            self._call(worker, token, found[1])

    def _session(self) -> Session:
        """Return a session that goes on for the length of a lease."""
        sessions = self._sessions.get()
        if not sessions.opening.acquire(timeout=self._patience):
            raise Unavailable
        try:
            session = sessions.present
            if session is not None:
                age = clock() - session.renewed_at
                if age <= self.session_length - self.lease:
                    return session
                # No lock that somebody counts on is left in one that is older.
                if age <= self.session_length and self._renew(session):
                    return session
            began = clock()
            session = sessions.present = Session(self._open_session(), began)
            return session
        finally:
            sessions.opening.release()

    def _renew(self, session: Session) -> bool:
        self._clear_up(session)
        began = clock()
        if self._renew_session(session.name):
            session.renewed_at = began
            return True
        self._sessions.get().drop(session)
        return False

    def _clear_up(self, session: Session) -> None:
        """Free the locks of doubtful tokens, most of which never came to hold one."""
        for token, (_, since) in list(session.doubtful.items()):
            if clock() - since > self.session_length:
                # No request is under way for so long.
                session.doubtful.pop(token, None)
        doubtful = {
            token: id for token, (id, _) in session.doubtful.items() if id not in session.tokens
        }
        if not doubtful:
            return
        held = set(self._still_there(session.name, set(doubtful.values())))
        for token, id in doubtful.items():
            if id in held:
                self._remove(id, token)
