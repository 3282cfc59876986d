"""Records of uploads in files, one JSON file each, that people can read and copy.

This file owns the directory of records and the order of its writes: a file appears or is
replaced as a whole, and processes that save the same record exclude each other by flock.
Searching means reading everything; a store for many uploads is the SQL store's business.
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
    InfoConflict,
    StorageFull,
    TusError,
    Unavailable,
    UploadExists,
    UploadNotFound,
    may_pass,
    unusable,
)
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State, check_id
from tuswsgi.core.options import option
from tuswsgi.core.paths import adopt, inside, why_unwritable
from tuswsgi.core.process import let_others_run, run_in_thread
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.index import PendingMarkers, WaitingMarkers
from tuswsgi.infostores.kept import Kept

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SUFFIX = ".info"
_TEMPORARY = ".tmp"

#: Seconds after which claims look again at a record that they could not read.
_UNREADABLE = 60.0

#: How many records a search reads before it lets others run.
_SCAN = 100

#: Seconds until somebody who waits for another writer of the same record gives up.
_PATIENCE = 10.0

#: Between attempts to lock a record.
_BACKOFF = Backoff(first=0.002, longest=0.005)

#: Seconds after which a temporary file is surely nobody's any more.
_ABANDONED = 3600.0


@dataclass(repr=False, eq=False)
class FileInfoStore(InfoStore):
    """Records in a directory.

    ``<id>.info`` holds a record and its events. ``.waiting/<part>/<final>`` says that a
    final upload may wait for a part, ``.pending/<id>`` that an upload may have events: such a
    marker is written before the record, so a crash can leave one too many and never one too
    few.
    """

    info_dir: Path = option(
        None,
        "The directory of the info store `file`. Unset: a directory beside the data.",
        rustus="INFO_DIR",
    )
    force_fsync: bool = False

    def __post_init__(self) -> None:
        if not self.info_dir:
            raise ConfigurationError("The info store needs info_dir.")
        self._directory = Path(self.info_dir).absolute()
        self._waiting = WaitingMarkers(self._directory / ".waiting")
        self._pending = PendingMarkers(self._directory / ".pending")
        #: Which workers of this process have claimed events of which uploads.
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
            raise unusable(
                f"The directory {self._directory} cannot be used for records: {error}", error
            ) from error

    def check(self) -> None:
        error = run_in_thread(why_unwritable, self._directory)
        if error is not None:
            raise Unavailable from error

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        path = self._path(info.id)
        kept = Kept(info)
        kept.add(events)
        with _trouble(path):
            self._mark(kept)
            with self._written(kept) as temporary:
                try:
                    _link(temporary, path)
                except BaseException:
                    os.unlink(temporary)
                    raise
                # From here on it is not certain any more that nothing is written.
                with _trouble(path, full=Unavailable):
                    os.unlink(temporary)
                    self._sync(self._directory)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        path = self._path(info.id)
        with _trouble(path), _locked(path) as text:
            kept = _parse(info.id, text)
            old = kept.info
            if old.sequence != info.sequence:
                raise InfoConflict
            kept.info = saved = info.replace(sequence=info.sequence + 1)
            kept.add(events)
            self._replace(path, kept)
            if old.state is State.WAITING and saved.state is not State.WAITING:
                for part in dict.fromkeys(old.partial_uploads):
                    self._waiting.remove(check_id(part), old.id)
        return saved

    def forget(self, info: FileInfo) -> bool:
        path = self._path(info.id)
        try:
            with _trouble(path), _locked(path) as text:
                if not _parse(info.id, text).is_over(info.sequence):
                    return False
                # A marker stays: it may be that of a new upload with this id, whose record
                # comes next.
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
        # Page by page the directory would be read again and again.
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
        return self._read(id).undelivered(dead=dead)

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
        with _trouble(self._directory):
            due = self._pending.due(now) if upload is None else [upload]
        for kept in self._known(due):
            if kept.free(now, transport):
                wanted = partial(self._claim, worker, now, until, transport, limit - len(claimed))
                claimed += self._change(kept.info.id, wanted) or []
            elif upload is None and not kept.free(now):
                self._correct(kept.info.id)
            if len(claimed) >= limit:
                break
        return claimed

    def renew(self, worker: str, until: float) -> None:
        for claim in tuple(self._claimed):
            holder, id = claim
            if holder == worker and not self._change(id, lambda kept: kept.renew(worker, until)):
                self._claimed.discard(claim)

    def settle(self, event: Event) -> None:
        self._change(event.upload, partial(self._finish, event, []))

    def put_back(self, event: Event) -> None:
        self._change(event.upload, partial(self._finish, event, [event]))

    def outbox(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        with _trouble(self._directory):
            marked = self._pending.all()
        found = [
            event for kept in self._known(marked) for event in kept.events if event.dead is dead
        ]
        return sorted(found, key=lambda event: event.created_at)[:limit]

    def _claim(
        self, worker: str, now: float, until: float, transport: str | None, limit: int, kept: Kept
    ) -> Sequence[Event]:
        events = kept.free(now, transport)[:limit]
        kept.claim(events, worker, until)
        if events:
            self._claimed.add((worker, kept.info.id))
        return events

    def _finish(self, event: Event, instead: Sequence[Event], kept: Kept) -> bool:
        holder = kept.holder(event)
        found = kept.replace(event, instead)
        if holder is not None and not kept.is_held_by(holder):
            self._claimed.discard((holder, event.upload))
        return found

    def _change(self, id: str, change: Callable[[Kept], T]) -> T | None:
        """Change what is kept of an upload beside its record, and return what `change` did.

        Nothing is written if that is nothing.
        """
        try:
            path = self._path(id)
            with _trouble(path), _locked(path) as text:
                kept = _parse(id, text)
                result = change(kept)
                if result:
                    self._replace(path, kept)
                return result
        except UploadNotFound:
            return None
        except record.CorruptRecord as error:
            self._skip(id, error)
            return None

    def _correct(self, id: str) -> None:
        """Set a marker that is too early: a crash left it, or a claim came in between."""
        path = self._path(id)
        try:
            with _trouble(path), _locked(path) as text:
                self._set_marker(_parse(id, text))
        except (UploadNotFound, record.CorruptRecord):
            pass  # the next one to look at it will see

    def _set_marker(self, kept: Kept) -> None:
        if kept.events:
            self._pending.set(kept.info.id, kept.free_at())
        else:
            self._pending.remove(kept.info.id)

    def _path(self, id: str) -> Path:
        return inside(self._directory, check_id(id) + _SUFFIX)

    def _read(self, id: str) -> Kept:
        path = self._path(id)
        with _trouble(path):
            try:
                text = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                raise UploadNotFound from None
            return _parse(id, text)

    def _scan(self, after: str = "") -> Iterator[FileInfo]:
        with _trouble(self._directory):
            names = os.listdir(self._directory)
        ids = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return self._infos(sorted(id for id in ids if id > after))

    def _infos(self, ids: Iterable[str]) -> Iterator[FileInfo]:
        return (kept.info for kept in self._known(ids))

    def _known(self, ids: Iterable[str]) -> Iterator[Kept]:
        """Yield what is kept of `ids`, without those that are gone or not ours."""
        for count, id in enumerate(ids):
            if count % _SCAN == 0:
                # Many small reads in a row: let other greenlets run.
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

    def _replace(self, path: Path, kept: Kept) -> None:
        """Replace a record that is locked, and set its marker."""
        self._mark(kept)
        with self._written(kept) as temporary:
            os.replace(temporary, path)
            self._sync(self._directory)
            self._set_marker(kept)

    @contextmanager
    def _written(self, kept: Kept) -> Iterator[Path]:
        """Write a new file, to take the place of a record, and lock it for the length of a
        ``with`` block: the lock on the old file excludes nobody once the new one is there.
        """
        text = kept.encode() + "\n"
        path = self._directory / f".{kept.info.id}.{secrets.token_hex(4)}{_TEMPORARY}"
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

    def _mark(self, kept: Kept) -> None:
        """Set the markers that what is about to be written needs."""
        info = kept.info
        if kept.events and self._pending.set(info.id, 0.0):
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
                pass  # another process removed it


def _parse(id: str, text: bytes) -> Kept:
    kept = Kept.decode(text)
    if kept.info.id != id:
        raise record.CorruptRecord(f"The record of {kept.info.id} in the file of {id}.")
    return kept


@contextmanager
def _locked(path: Path) -> Iterator[bytes]:
    """Exclude other writers of the record; yields its text."""
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
        # A writer that was faster replaced the file: this lock is one on the old record.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass  # it was forgotten a moment ago: the next attempt finds what is there now
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
        # Unlike a rename this fails if there is such a file.
        os.link(source, target)
    except FileExistsError:
        # Over NFS a request that is sent again finds what it has done the first time.
        if os.stat(source).st_nlink < 2:
            raise UploadExists from None


@contextmanager
def _trouble(path: Path, full: type[TusError] = StorageFull) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.error("Cannot read or write %s: %s", path, error, exc_info=not may_pass(error))
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (full if is_full else Unavailable) from error
