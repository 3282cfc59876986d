"""SQLite for many greenlets, threads and processes: one connection writes, one reads.

Per process there is one connection of each kind. Greenlets that share a connection at
will mix their transactions, and a connection per greenlet costs 120 KiB each. This file
owns who uses which connection when, and the waiting for other processes: SQLite's own
waiting would block every greenlet of the process.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from peewee import OperationalError, PeeweeException, SqliteDatabase

from tuswsgi.connections.sql import Database, SqlConnection
from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import ConfigurationError, StorageFull, TusError, Unavailable, unusable
from tuswsgi.core.paths import adopt, make_directory, why_unwritable
from tuswsgi.core.process import PerProcess, let_others_run, run_in_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until somebody who waits for another process gives up.
_PATIENCE = 10.0

#: How many attempts come without a pause: the other process is done in less time than the
#: shortest one takes.
_PROMPT = 10

#: Between attempts after that.
_BACKOFF = Backoff(first=0.001, longest=0.02)

#: How many writes share one commit at most.
_BATCH = 100


class SqliteConnection(SqlConnection):
    """A database in a file.

    :param path: the file; it and its directory are created.
    :param force_fsync: commits are synced to the disk.
    """

    kind = "sqlite"
    placeholder = "?"
    now = "((julianday('now') - 2440587.5) * 86400.0)"
    for_update = ""

    def __init__(self, path: Path, *, force_fsync: bool = False) -> None:
        self._path = path
        self._force_fsync = force_fsync
        self._handles: PerProcess[_Handles] = PerProcess(self._make_handles)

    def __str__(self) -> str:
        return str(self._path)

    def prepare(self) -> None:
        database = _database(self._path, force_fsync=self._force_fsync)
        try:
            make_directory(self._path.parent)
            # Root's log follows the file: SQLite sees to that.
            if _make_file(self._path):
                adopt(self._path, self._path.parent)
            # The mode stays with the file. With a log beside it readers and the writer do
            # not wait for each other.
            (mode,) = _patiently(
                lambda: database.execute_sql("PRAGMA journal_mode = wal").fetchone(), _deadline()
            )
        except (OSError, PeeweeException) as error:
            cause = self._cause(error)
            raise unusable(f"The database {self._path} cannot be used: {error}", cause) from cause
        finally:
            database.close()
        if mode != "wal":
            raise ConfigurationError(
                f"The database {self._path} must be on a local file system: "
                "SQLite's write-ahead log does not work there."
            )

    def _cause(self, error: Exception) -> OSError:
        """Return what the system said: SQLite does not tell."""
        if isinstance(error, OSError):
            return error
        if _is_busy(error):
            return OSError(errno.EBUSY, str(error))
        if str(error) == "disk I/O error":
            return OSError(errno.EIO, str(error))
        return why_unwritable(self._path.parent) or OSError(str(error))

    def read(self, fn: Callable[[Database], T]) -> T:
        try:
            return self._handles.get().reader.run(fn)
        except PeeweeException as error:
            raise _trouble(error) from error

    def write(self, fn: Callable[[Database], T]) -> T:
        try:
            return self._handles.get().writer.run(fn)
        except PeeweeException as error:
            raise _trouble(error) from error

    def migrate(self, fn: Callable[[Database], T]) -> T:
        return self.write(fn)

    def close(self) -> None:
        handles = self._handles.pop()
        if handles is not None:
            handles.close()

    def _make_handles(self) -> _Handles:
        return _Handles(self._path, force_fsync=self._force_fsync)


#: Connections of all processes that this one descends from. A child must not even close
#: its parent's, which would touch the log that the parent goes on using.
_opened: set[_Handles] = set()


class _Handles:
    """The two connections of one process."""

    def __init__(self, path: Path, *, force_fsync: bool) -> None:
        self.reader = _Reader(_database(path, force_fsync=force_fsync))
        self.writer = _Writer(_database(path, force_fsync=force_fsync), slow=force_fsync)
        _opened.add(self)

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        _opened.discard(self)


class _Reader:
    """The reading connection, for one thread at a time; greenlets never wait here."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._closing = False

    def run(self, fn: Callable[[Database], T]) -> T:
        # Readers wait only for a process that opens or closes the file.
        return _patiently(lambda: self._read(fn), _deadline())

    def close(self) -> None:
        self._closing = True
        with self._lock:
            self._database.close()

    def _read(self, fn: Callable[[Database], T]) -> T:
        with self._lock:
            try:
                return fn(self._database)
            finally:
                if self._closing:
                    self._database.close()


class _Write:
    """One function that waits to be run by whoever leads."""

    def __init__(self, fn: Callable[[Database], Any]) -> None:
        self.fn = fn
        self.deadline = _deadline()
        self.leads = False
        self.woken: threading.Event | None = None
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, database: Database) -> None:
        """Run the function; its failure is its own and undoes its own work only."""
        database.execute_sql("SAVEPOINT one_write")
        self._try(database, undo="ROLLBACK TO one_write")
        database.execute_sql("RELEASE one_write")

    def run_alone(self, database: Database) -> None:
        """Run the function in a transaction of its own, which has begun."""
        self._try(database, undo="ROLLBACK")
        if self.error is None:
            database.execute_sql("COMMIT")

    def _try(self, database: Database, undo: str) -> None:
        try:
            self.result = self.fn(database)
        except Exception as error:
            self.error = error
            _undo(database, undo, error)


class _Writer:
    """The writing connection: whoever leads uses it, for all who wait.

    A write joins the queue. If nobody leads, its caller does: it begins a transaction,
    runs everything that is in the queue by then, commits, wakes the others with their
    results and leaves the lead to the next in the queue. Without concurrency that is a
    plain transaction in the caller's own greenlet, and there is no thread or greenlet for
    writing that would have to be started, watched and stopped in each process.

    The leader waits for other processes before BEGIN succeeds. From then on to the end of
    COMMIT nothing switches greenlets, unless commits are slow.

    :param slow: commits wait for the disk: let others go on meanwhile.
    """

    def __init__(self, database: Database, *, slow: bool) -> None:
        self._database = database
        self._slow = slow
        self._mutex = threading.Lock()
        self._queue: deque[_Write] = deque()
        self._led = False
        self._closing = False
        #: Whether the batch of whoever leads is done, so that each write knows how it ended.
        self._done = False

    def run(self, fn: Callable[[Database], T]) -> T:
        write = _Write(fn)
        with self._mutex:
            self._queue.append(write)
            if self._led:
                write.woken = threading.Event()
            else:
                self._led = write.leads = True
        if write.woken is not None:
            self._follow(write, write.woken)
        if write.leads:
            self._lead(write)
        if write.error is not None:
            raise write.error
        return cast(T, write.result)

    def close(self) -> None:
        """Close the connection, now or when the last write is done."""
        with self._mutex:
            self._closing = True
            if not self._led:
                self._database.close()

    def _follow(self, write: _Write, woken: threading.Event) -> None:
        try:
            woken.wait()
        except BaseException:
            # The end of this greenlet: it must leave neither its write nor the lead behind.
            with self._mutex:
                if write in self._queue:
                    self._queue.remove(write)
            if write.leads:
                self._hand_over()
            raise

    def _lead(self, write: _Write) -> None:
        try:
            # Other requests may be as far in a moment, and share the commit.
            let_others_run()
            _patiently(lambda: self._database.execute_sql("BEGIN IMMEDIATE"), write.deadline)
        except BaseException:
            with self._mutex:
                self._queue.remove(write)
            self._database.close()
            raise
        else:
            self._commit(self._take())
        finally:
            self._hand_over()

    def _take(self) -> list[_Write]:
        with self._mutex:
            return [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]

    def _commit(self, batch: list[_Write]) -> None:
        self._done = False
        try:
            if self._slow:
                run_in_thread(self._run, batch)
            else:
                self._run(batch)
        except BaseException as error:
            # The end of this greenlet may have come while a thread did the work to its end.
            if not self._done:
                self._fail(batch, error)
            if not isinstance(error, Exception):
                raise
        finally:
            for write in batch:
                if write.woken is not None:
                    write.woken.set()

    def _fail(self, batch: list[_Write], error: BaseException) -> None:
        # Closing rolls back, whatever state the connection is in.
        self._database.close()
        for write in batch:
            write.error = error if isinstance(error, Exception) else Unavailable()

    def _run(self, batch: list[_Write]) -> None:
        if len(batch) == 1:
            batch[0].run_alone(self._database)
        else:
            self._run_together(batch)
        self._done = True

    def _run_together(self, batch: list[_Write]) -> None:
        self._database.execute_sql("SAVEPOINT before_all")
        try:
            for write in batch:
                write.result = write.fn(self._database)
        except Exception as error:
            # It is rare, so a savepoint for each is made only now.
            _undo(self._database, "ROLLBACK TO before_all", error)
            for write in batch:
                write.run(self._database)
        self._database.execute_sql("COMMIT")

    def _hand_over(self) -> None:
        with self._mutex:
            self._led = bool(self._queue)
            if self._led:
                successor = self._queue[0]
                successor.leads = True
                cast(threading.Event, successor.woken).set()
            elif self._closing:
                self._database.close()


def _make_file(path: Path) -> bool:
    """Make an empty database and return whether it was missing."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True


def _database(path: Path, *, force_fsync: bool) -> Database:
    database: Database = SqliteDatabase(
        str(path),
        # One connection for all threads, that nobody uses at the same time as another.
        thread_safe=False,
        check_same_thread=False,
        # Waiting in C blocks all greenlets: see _patiently.
        timeout=0,
        pragmas={"synchronous": "full" if force_fsync else "normal"},
    )
    return database


def _undo(database: Database, statement: str, error: Exception) -> None:
    """Undo what failed with `error`, which is raised if that is impossible."""
    try:
        database.execute_sql(statement)
    except OperationalError:
        # On a full disk and the like SQLite has undone the whole transaction.
        raise error from None


def _deadline() -> float:
    return time.monotonic() + _PATIENCE


def _patiently(action: Callable[[], T], deadline: float) -> T:
    """Run `action` again and again while another process is in its way."""
    attempts = 0
    while True:
        try:
            return action()
        except OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= deadline:
                raise
        attempts += 1
        if attempts <= _PROMPT:
            let_others_run()
        else:
            time.sleep(_BACKOFF.after(attempts - _PROMPT))


# Python 3.10 knows no error codes of SQLite; its texts have been the same for ever.


def _is_busy(error: Exception) -> bool:
    return str(error) == "database is locked"


def _trouble(error: PeeweeException) -> TusError:
    if str(error) == "database or disk is full":
        return StorageFull()
    logger.error("The database failed: %s", error, exc_info=error)
    return Unavailable()
