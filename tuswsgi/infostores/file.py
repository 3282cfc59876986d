"""Records of uploads in JSON files, one per upload, that people can read and copy.

A file is created or replaced as a whole, and processes that write the same record exclude
each other by flock. Searching reads all files, so many uploads belong in the SQL store.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import (
    ConfigurationError,
    StorageFull,
    TusError,
    Unavailable,
    UploadExists,
    UploadNotFound,
    is_temporary,
    startup_error,
)
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State, check_id
from tuswsgi.core.options import option
from tuswsgi.core.paths import adopt, inside, why_unwritable
from tuswsgi.core.process import let_others_run, run_in_thread
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.entry import Entry, oldest_events
from tuswsgi.infostores.markers import PendingMarkers, WaitingMarkers

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SUFFIX = ".info"
_TEMPORARY = ".tmp"

#: Seconds after which ``claim`` tries again to read an unreadable record.
_UNREADABLE = 60.0

#: How many records a search reads before it lets other greenlets run.
_SCAN = 100

#: The longest wait for another writer of the same record, in seconds.
_PATIENCE = 10.0

#: The pauses between attempts to lock a record.
_BACKOFF = Backoff(first=0.002, longest=0.005)

#: Seconds after which a temporary file or a marker without a record is left by a crash.
_ABANDONED = 3600.0


@dataclass(repr=False, eq=False)
class FileInfoStore(InfoStore):
    """Records in a directory.

    ``<id>.info`` holds a record and its events. Two kinds of empty files, the markers, make
    uploads easy to find: ``.waiting/<part>/<final>`` if a final upload may wait for a part,
    ``.pending/<id>`` if an upload may have events. They are written before the record, so a
    crash can leave a marker too many, but never one too few.

    :param force_fsync: let writes survive a power loss.
    """

    info_dir: Path = option(
        None,
        "The directory of `file-info-storage`. Unset: `.tuswsgi/info` below the data directory.",
        rustus="INFO_DIR",
    )
    force_fsync: bool = False

    def __post_init__(self) -> None:
        if not self.info_dir:
            raise ConfigurationError("The info store needs info_dir.")
        self._directory = Path(self.info_dir).absolute()
        self._waiting = WaitingMarkers(self._directory / ".waiting")
        self._pending = PendingMarkers(self._directory / ".pending")
        #: The workers of this process that have claimed events, with the uploads' ids.
        self._claimed: set[tuple[str, str]] = set()

    def prepare(self) -> None:
        try:
            self._waiting.prepare()
            self._pending.prepare()
            self._remove_abandoned()
            self._pending.remove_abandoned(
                time.time() - _ABANDONED, lambda id: (self._directory / f"{id}{_SUFFIX}").exists()
            )
        except OSError as error:
            raise startup_error(
                f"The directory {self._directory} cannot be used for records: {error}", error
            ) from error

    def check(self) -> None:
        error = run_in_thread(why_unwritable, self._directory)
        if error is not None:
            raise Unavailable from error

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        path = self._path(info.id)
        entry = Entry.new(info, events)
        with _errors_translated(path):
            self._mark(entry)
            with self._written(entry) as temporary:
                try:
                    _link(temporary, path)
                except BaseException:
                    os.unlink(temporary)
                    raise
                # StorageFull would say that nothing was written.
                with _errors_translated(path, full=Unavailable):
                    os.unlink(temporary)
                    self._sync(self._directory)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        path = self._path(info.id)
        with _errors_translated(path), _locked(path) as text:
            entry = _parse(info.id, text)
            old = entry.info
            saved = entry.save(info, events)
            self._replace(path, entry)
            if old.state is State.WAITING and saved.state is not State.WAITING:
                for part in dict.fromkeys(old.partial_uploads):
                    self._waiting.remove(check_id(part), old.id)
        return saved

    def forget(self, info: FileInfo) -> bool:
        path = self._path(info.id)
        try:
            with _errors_translated(path), _locked(path) as text:
                if not _parse(info.id, text).is_forgettable(info.sequence):
                    return False
                # Markers stay: a new upload with this id may have set them before its record.
                path.unlink()
                self._sync(self._directory)
        except UploadNotFound:
            return False
        except record.CorruptRecord as error:
            self._skip(info.id, error)
            return False
        return True

    def load(self, id: str) -> FileInfo:
        return self._read(id).info

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        found = (info for info in self._scan(after) if states is None or info.state in states)
        return [*islice(found, limit)]

    def scan(self, state: State) -> Iterator[FileInfo]:
        # In pages, the directory would be read once per page.
        return (info for info in self._scan() if info.state is state)

    def usage(self) -> int:
        return sum(info.promised for info in self._scan())

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found = (info.id for info in self._scan() if info.has_expired(now) and not info.is_gone)
        return [*islice(found, limit)]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        try:
            finals = self._waiting.finals(check_id(part))
        except UploadNotFound:
            return []
        return [info.id for info in self._infos(finals) if info.state is State.WAITING]

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        try:
            return self._read(id).undelivered(dead=dead)
        except UploadNotFound:
            return []

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
        claimed: list[Event] = []
        with _errors_translated(self._directory):
            due = self._pending.due(now) if upload is None else [upload]
        for entry in self._entries(due):
            id = entry.info.id
            if entry.free(now, transport):
                left = limit - len(claimed)
                claim = partial(self._claim, worker, now, until, transport, left)
                claimed += self._change(id, claim) or []
            elif upload is None and not entry.free(now):
                self._correct(id)
            if len(claimed) >= limit:
                break
        return claimed

    def renew(self, worker: str, until: float) -> None:
        for claim in tuple(self._claimed):
            holder, id = claim
            if holder == worker and not self._change(id, lambda entry: entry.renew(worker, until)):
                self._claimed.discard(claim)

    def settle(self, event: Event) -> None:
        self._change(event.upload, partial(self._release, lambda entry: entry.settle(event)))

    def put_back(self, event: Event) -> None:
        self._change(event.upload, partial(self._release, lambda entry: entry.put_back(event)))

    def undelivered(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        with _errors_translated(self._directory):
            marked = self._pending.all()
        return oldest_events(self._entries(marked), dead=dead, limit=limit)

    def _claim(
        self, worker: str, now: float, until: float, transport: str | None, limit: int, entry: Entry
    ) -> Sequence[Event]:
        events = entry.claim(worker, now, until, transport, limit)
        if events:
            self._claimed.add((worker, entry.info.id))
        return events

    def _release(self, change: Callable[[Entry], bool], entry: Entry) -> bool:
        before = entry.workers
        changed = change(entry)
        self._claimed -= {(worker, entry.info.id) for worker in before - entry.workers}
        return changed

    def _change(self, id: str, change: Callable[[Entry], T]) -> T | None:
        """Change the events or claims of an upload, and return what `change` returns.

        Nothing is written if that is false.
        """
        try:
            path = self._path(id)
            with _errors_translated(path), _locked(path) as text:
                entry = _parse(id, text)
                result = change(entry)
                if result:
                    self._replace(path, entry)
                return result
        except UploadNotFound:
            return None
        except record.CorruptRecord as error:
            self._skip(id, error)
            return None

    def _correct(self, id: str) -> None:
        """Set a marker that is too early, because of a crash or a claim in the meantime."""
        path = self._path(id)
        try:
            with _errors_translated(path), _locked(path) as text:
                self._set_marker(_parse(id, text))
        except (UploadNotFound, record.CorruptRecord):
            pass  # the next claim finds it again

    def _set_marker(self, entry: Entry) -> None:
        if entry.events:
            self._pending.set(entry.info.id, min(entry.free_at().values(), default=None))
        else:
            self._pending.remove(entry.info.id)

    def _path(self, id: str) -> Path:
        return inside(self._directory, check_id(id) + _SUFFIX)

    def _read(self, id: str) -> Entry:
        path = self._path(id)
        with _errors_translated(path):
            try:
                text = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                raise UploadNotFound from None
            return _parse(id, text)

    def _scan(self, after: str = "") -> Iterator[FileInfo]:
        with _errors_translated(self._directory):
            names = os.listdir(self._directory)
        ids = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return self._infos(sorted(id for id in ids if id > after))

    def _infos(self, ids: Iterable[str]) -> Iterator[FileInfo]:
        return (entry.info for entry in self._entries(ids))

    def _entries(self, ids: Iterable[str]) -> Iterator[Entry]:
        """Yield the entries of `ids`, without those that are missing or unreadable."""
        for count, id in enumerate(ids):
            if count % _SCAN == 0:
                let_others_run()
            try:
                yield self._read(id)
            except UploadNotFound:
                pass
            except record.CorruptRecord as error:
                self._skip(id, error)

    def _skip(self, id: str, error: record.CorruptRecord) -> None:
        logger.warning("Skipping %s in %s: %s", id + _SUFFIX, self._directory, error)
        self._pending.postpone(id, time.time() + _UNREADABLE)

    def _replace(self, path: Path, entry: Entry) -> None:
        """Replace a record that is locked, and set its marker."""
        self._mark(entry)
        with self._written(entry) as temporary:
            os.replace(temporary, path)
            self._sync(self._directory)
            self._set_marker(entry)

    @contextmanager
    def _written(self, entry: Entry) -> Iterator[Path]:
        """Write a temporary file that is to replace a record, and lock it for a ``with`` block:
        once it has replaced the record, a lock on the old file excludes no other writer.
        """
        text = entry.encode() + "\n"
        path = self._directory / f".{entry.info.id}.{secrets.token_hex(4)}{_TEMPORARY}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(fd, "w", encoding="ascii") as file:
            try:
                adopt(fd, self._directory)
                fcntl.flock(fd, fcntl.LOCK_EX)
                file.write(text)
                file.flush()
                if self.force_fsync:
                    os.fsync(fd)
            except BaseException:
                path.unlink()
                raise
            yield path

    def _mark(self, entry: Entry) -> None:
        """Set the markers of an entry that is about to be written."""
        info = entry.info
        if entry.events and self._pending.set(info.id, 0.0):
            self._sync(self._directory / ".pending")
        if info.state is State.WAITING:
            for part in dict.fromkeys(info.partial_uploads):
                self._waiting.add(check_id(part), info.id)
                self._sync(self._directory / ".waiting" / part)
            self._sync(self._directory / ".waiting")

    def _sync(self, directory: Path) -> None:
        if not self.force_fsync:
            return
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove_abandoned(self) -> None:
        for path in self._directory.glob(f".*{_TEMPORARY}"):
            try:
                if path.stat().st_mtime < time.time() - _ABANDONED:
                    path.unlink()
            except FileNotFoundError:
                pass  # another process has removed it


def _parse(id: str, text: bytes) -> Entry:
    entry = Entry.decode(text)
    if entry.info.id != id:
        raise record.CorruptRecord(f"The record of {entry.info.id} in the file of {id}.")
    return entry


@contextmanager
def _locked(path: Path) -> Iterator[bytes]:
    """Lock a record for a ``with`` block, and yield its text."""
    deadline = time.monotonic() + _PATIENCE
    attempts = 0
    while (fd := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise Unavailable
        attempts += 1
        time.sleep(_BACKOFF.after(attempts))
    with open(fd, "rb") as file:
        yield file.read()


def _try_lock(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise UploadNotFound from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have replaced the file since: then the old file is locked.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass  # it was forgotten a moment ago; the next attempt sees what is there now
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _link(source: Path, target: Path) -> None:
    """Give a record its name.

    :raises UploadExists: if another one has it.
    """
    try:
        # Unlike a rename, this fails if the file exists.
        os.link(source, target)
    except FileExistsError:
        # Over NFS, a request that is sent again fails on the link it made the first time.
        if os.stat(source).st_nlink < 2:
            raise UploadExists from None


@contextmanager
def _errors_translated(path: Path, full: type[TusError] = StorageFull) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.error("Cannot read or write %s: %s", path, error, exc_info=not is_temporary(error))
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (full if is_full else Unavailable) from error
