"""SQLite for many greenlets, threads and processes.

Each process has one connection that reads and one that writes. A connection per greenlet would
cost 120 KiB each. Writes of several greenlets share a commit. Waiting for other processes is
done here, because SQLite's own waiting would block all greenlets of the process.
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
from tuswsgi.core.errors import (
    ConfigurationError,
    StorageFull,
    TusError,
    Unavailable,
    startup_error,
)
from tuswsgi.core.paths import adopt, make_directory, why_unwritable
from tuswsgi.core.process import PerProcess, let_others_run, run_in_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds to wait for the lock of another process.
_TIMEOUT = 10.0

#: How many attempts come without a pause: most transactions are shorter than any pause.
_PROMPT = 10

#: Between later attempts.
_BACKOFF = Backoff(first=0.001, longest=0.02)

#: How many writes may share a commit.
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
            # SQLite gives its log the owner of the file.
            if _make_file(self._path):
                adopt(self._path, self._path.parent)
            # The mode is stored in the file. With a write-ahead log readers and the writer do
            # not wait for each other.
            (mode,) = _retry_busy(
                lambda: database.execute_sql("PRAGMA journal_mode = wal").fetchone(), _deadline()
            )
        except (OSError, PeeweeException) as error:
            cause = self._cause(error)
            raise startup_error(
                f"The database {self._path} cannot be used: {error}", cause
            ) from cause
        finally:
            database.close()
        if mode != "wal":
            raise ConfigurationError(
                f"The database {self._path} must be on a local file system: "
                "SQLite's write-ahead log does not work there."
            )

    def _cause(self, error: Exception) -> OSError:
        """Return the error of the operating system, which SQLite does not pass on."""
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
            raise _tus_error(error) from error

    def write(self, fn: Callable[[Database], T]) -> T:
        try:
            return self._handles.get().writer.run(fn)
        except PeeweeException as error:
            raise _tus_error(error) from error

    def migrate(self, fn: Callable[[Database], T]) -> T:
        return self.write(fn)

    def close(self) -> None:
        handles = self._handles.pop()
        if handles is not None:
            handles.close()

    def _make_handles(self) -> _Handles:
        return _Handles(self._path, force_fsync=self._force_fsync)


#: The connections of this process and of its ancestors. They are kept here because a child must
#: not close its parent's, not even by garbage collection: that changes the parent's log.
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
    """The connection for reading, for one thread at a time; greenlets never wait here."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._closing = False

    def run(self, fn: Callable[[Database], T]) -> T:
        # A reader only waits for a process that opens or closes the file.
        return _retry_busy(lambda: self._read(fn), _deadline())

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
    """A write in the queue."""

    def __init__(self, fn: Callable[[Database], Any]) -> None:
        self.fn = fn
        self.deadline = _deadline()
        self.leads = False
        self.woken: threading.Event | None = None
        self.result: Any = None
        self.error: Exception | None = None

    def run(self, database: Database) -> None:
        """Run the function in a savepoint, so that its failure undoes its own writes only."""
        database.execute_sql("SAVEPOINT one_write")
        self._try(database, undo="ROLLBACK TO one_write")
        database.execute_sql("RELEASE one_write")

    def run_alone(self, database: Database) -> None:
        """Run the function in the present transaction, and commit."""
        self._try(database, undo="ROLLBACK")
        if self.error is None:
            database.execute_sql("COMMIT")

    def _try(self, database: Database, undo: str) -> None:
        try:
            self.result = self.fn(database)
        except Exception as error:
            self.error = error
            _roll_back(database, undo, error)


class _Writer:
    """The connection for writing, with group commit.

    A write joins the queue. If there is no leader, its caller becomes the leader: it begins a
    transaction, runs all writes in the queue, commits, wakes the other callers with their
    results and passes the lead to the next in the queue. Without concurrency this is a plain
    transaction in the caller's greenlet, and no process needs a thread for writing.

    The leader waits for other processes in BEGIN. Greenlets do not switch between BEGIN and the
    end of COMMIT, unless commits are slow.

    :param slow: commits wait for the disk, so they run in a thread.
    """

    def __init__(self, database: Database, *, slow: bool) -> None:
        self._database = database
        self._slow = slow
        self._mutex = threading.Lock()
        self._queue: deque[_Write] = deque()
        self._led = False
        self._closing = False
        #: Whether all writes of the leader's batch have their results.
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
            # This greenlet was killed: it must leave neither its write nor the lead behind.
            with self._mutex:
                if write in self._queue:
                    self._queue.remove(write)
            if write.leads:
                self._hand_over()
            raise

    def _lead(self, write: _Write) -> None:
        try:
            # Let other requests join the commit.
            let_others_run()
            _retry_busy(lambda: self._database.execute_sql("BEGIN IMMEDIATE"), write.deadline)
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
            # This greenlet may have been killed while a thread finished the commit.
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
            # Failures are rare, so that only a second attempt has savepoints.
            _roll_back(self._database, "ROLLBACK TO before_all", error)
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
    """Create an empty database; return whether it was missing."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True


def _database(path: Path, *, force_fsync: bool) -> Database:
    database: Database = SqliteDatabase(
        str(path),
        # One connection for all threads, which use it one at a time.
        thread_safe=False,
        check_same_thread=False,
        # SQLite's waiting would block all greenlets: see _retry_busy.
        timeout=0,
        pragmas={"synchronous": "full" if force_fsync else "normal"},
    )
    return database


def _roll_back(database: Database, statement: str, error: Exception) -> None:
    """Roll back what failed with `error`, which is raised if that is impossible."""
    try:
        database.execute_sql(statement)
    except OperationalError:
        # After some errors, such as a full disk, SQLite has rolled back the transaction.
        raise error from None


def _deadline() -> float:
    return time.monotonic() + _TIMEOUT


def _retry_busy(action: Callable[[], T], deadline: float) -> T:
    """Repeat `action` while another process has the database locked."""
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


# Python 3.10 does not know SQLite's error codes; the messages have never changed.


def _is_busy(error: Exception) -> bool:
    return str(error) == "database is locked"


def _tus_error(error: PeeweeException) -> TusError:
    if str(error) == "database or disk is full":
        return StorageFull()
    logger.error("The database failed: %s", error, exc_info=error)
    return Unavailable()
