"""Leases that expire together: all locks of a process belong to its one session on the server.

etcd (where sessions are called leases) and Consul delete keys when their session expires, and a
session is renewed as a whole, which costs the same for one lock as for thousands. This module
opens and renews the session of each process. A subclass knows the server's API.
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

#: How much longer a session is than a lease, so that it need not be renewed for each lock.
_SESSION_FACTOR = 1.25


class SessionGone(Exception):
    """A session has expired, and its locks with it."""


@dataclass(eq=False)
class Session:
    """A session of this process.

    :ivar renewed_at: when its last renewal was sent, on ``clock``.
    :ivar tokens: the holders of its locks, by the locks' ids.
    :ivar uncertain: tokens whose request or release failed, so that the server may hold a lock
        for them until the session ends; the lock's id of each, and when it failed.
    """

    name: str
    renewed_at: float
    tokens: dict[str, str] = field(default_factory=dict)
    uncertain: dict[str, tuple[str, float]] = field(default_factory=dict)


class Connection(Protocol):
    """A client of the server."""

    def check(self) -> None:
        """Check that the server accepts our login.

        :raises ConfigurationError: if not.
        """

    def close(self) -> None:
        """Close all connections."""


C = TypeVar("C", bound=Connection)


class Sessions:
    """The current session of a process, which one request at a time opens."""

    def __init__(self) -> None:
        self.current: Session | None = None
        self.opening = threading.Lock()

    def drop(self, session: Session) -> None:
        if self.current is session:
            self.current = None


class SessionLocker(LeaseLocker, Generic[C]):
    """Exclusive locks that a server keeps for as long as a session.

    :param lock_timeout: how long ``lock`` waits for a holder, in seconds.
    :param lock_lease: how long a lock is certainly held after its session was renewed, in seconds;
        the server frees it a quarter later.
    :param host_locker: locks of this host; one is held together with each lease.
    :param open_timeout: how long a request waits for another one to open the session, in
        seconds.
    :param connect: makes the client of a process, without opening connections.
    """

    # Each attempt is a write that a majority of the cluster must agree on.
    backoff = Backoff(first=0.002, longest=0.1)
    request_pause = 0.25

    def __init__(
        self,
        lock_timeout: float,
        lock_lease: float,
        host_locker: Locker[Any] | None,
        open_timeout: float,
        connect: Callable[[], C],
    ) -> None:
        super().__init__(lock_timeout, lock_lease, host_locker)
        self._open_timeout = open_timeout
        self._connection: PerProcess[C] = PerProcess(connect)
        self._sessions: PerProcess[Sessions] = PerProcess(Sessions)

    def prepare(self) -> None:
        super().prepare()
        try:
            self._connection.get().check()
        finally:
            # The caller may fork, which connections do not survive.
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
        """After how many seconds a session expires unless it is renewed."""
        return math.ceil(self.lock_lease * _SESSION_FACTOR)

    @abstractmethod
    def _open_session(self) -> str:
        """Return the name of a new session of ``session_length``.

        :raises Unavailable: if the server cannot be reached; also by the methods below.
        """

    @abstractmethod
    def _renew_session(self, session: str) -> bool:
        """Renew a session; return whether it exists."""

    @abstractmethod
    def _create(self, session: str, id: str, token: str) -> str | None:
        """Create the key of a lock, as ``_take`` does. It ends with the session, but its writer
        does not.

        :raises SessionGone: if the session has expired.
        """

    @abstractmethod
    def _delete(self, id: str, token: str) -> None:
        """Delete the keys of a lock and its writer, as ``_free`` does."""

    @abstractmethod
    def _held_in(self, session: str, ids: Collection[str]) -> Collection[str]:
        """Return those of `ids` whose locks are held in a session of this process."""

    @abstractmethod
    def _find_holder(self, id: str) -> tuple[str, str] | None:
        """Return the token that holds the lock of `id`, and its session."""

    @abstractmethod
    def _put_request(self, worker: str, token: str, session: str) -> None:
        """Put a release request for `token` where `worker` listens. It ends with the holder's
        session.
        """

    def _take(self, id: str, token: str) -> str | None:
        try:
            return self._take_in(self._session(), id, token)
        except SessionGone:
            pass  # the next session is new
        try:
            return self._take_in(self._session(), id, token)
        except SessionGone:
            raise Unavailable from None

    def _take_in(self, session: Session, id: str, token: str) -> str | None:
        try:
            writer = self._create(session.name, id, token)
        except SessionGone:
            self._sessions.get().drop(session)
            raise
        except BaseException:
            session.uncertain[token] = id, clock()
            raise
        if writer is not None:
            session.tokens[id] = token
        return writer

    def _free(self, id: str, token: str) -> None:
        session = self._sessions.get().current
        if session is not None and session.tokens.get(id) == token:
            del session.tokens[id]
        try:
            self._delete(id, token)
        except BaseException:
            if session is not None:
                session.uncertain[token] = id, clock()
            raise

    def _renew(self, held: Mapping[str, str]) -> Collection[str]:
        session = self._sessions.get().current
        if session is None or not self._keep_alive(session):
            return ()
        # Locks of an earlier session are lost.
        ids = [id for token, id in held.items() if session.tokens.get(id) == token]
        return {session.tokens.get(id, "") for id in self._held_in(session.name, ids)}

    def _holder(self, id: str) -> str | None:
        found = self._find_holder(id)
        return found[0] if found is not None else None

    def _send_request(self, worker: str, id: str, token: str) -> None:
        found = self._find_holder(id)
        if found is not None and found[0] == token:
            self._put_request(worker, token, found[1])

    def _session(self) -> Session:
        """Return a session that lasts for at least another lease."""
        sessions = self._sessions.get()
        if not sessions.opening.acquire(timeout=self._open_timeout):
            raise Unavailable
        try:
            session = sessions.current
            if session is not None:
                age = clock() - session.renewed_at
                if age <= self.session_length - self.lock_lease:
                    return session
                # An older session has no locks that their holders still rely on.
                if age <= self.session_length and self._keep_alive(session):
                    return session
            began = clock()
            session = sessions.current = Session(self._open_session(), began)
            return session
        finally:
            sessions.opening.release()

    def _keep_alive(self, session: Session) -> bool:
        self._delete_uncertain(session)
        began = clock()
        if self._renew_session(session.name):
            session.renewed_at = began
            return True
        self._sessions.get().drop(session)
        return False

    def _delete_uncertain(self, session: Session) -> None:
        """Delete the locks that the server may hold for uncertain tokens."""
        for token, (_, since) in list(session.uncertain.items()):
            if clock() - since > self.session_length:
                # No request takes that long.
                session.uncertain.pop(token, None)
        uncertain = {
            token: id for token, (id, _) in session.uncertain.items() if id not in session.tokens
        }
        if not uncertain:
            return
        held = set(self._held_in(session.name, set(uncertain.values())))
        for token, id in uncertain.items():
            if id in held:
                self._delete(id, token)
