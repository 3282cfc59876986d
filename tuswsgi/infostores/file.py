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
import random
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tuswsgi.errors import (
    ConfigurationError,
    InfoConflict,
    StorageFull,
    Unavailable,
    UploadExists,
    UploadNotFound,
)
from tuswsgi.hooks.base import Event
from tuswsgi.info import FileInfo, State, check_id
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.options import option
from tuswsgi.paths import inside
from tuswsgi.process import let_others_run

logger = logging.getLogger(__name__)

_SUFFIX = ".info"
_TEMPORARY = ".tmp"

#: How many records a search reads before it lets others run.
_SCAN = 100

#: Seconds until somebody who waits for another writer of the same record gives up.
_PATIENCE = 10.0

#: Seconds after which a temporary file is surely nobody's any more.
_ABANDONED = 3600.0


@dataclass(repr=False, eq=False)
class FileInfoStore(InfoStore):
    """Records in a directory.

    ``<id>.info`` holds a record and its events. ``.waiting/<part>/<final>`` says that a
    final upload may wait for a part: such a marker is written before the record, so a
    crash can leave one too many and never one too few.
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
        self._waiting = self._directory / ".waiting"

    def prepare(self) -> None:
        try:
            self._waiting.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
        except OSError as error:
            raise ConfigurationError(
                f"The directory {self._directory} cannot be used for records: {error}"
            ) from error

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        path = self._path(info.id)
        with _trouble(path):
            self._mark(info)
            temporary = self._write(info, events)
            try:
                # Unlike a rename this fails if there is such a file.
                os.link(temporary, path)
            except FileExistsError:
                raise UploadExists from None
            finally:
                os.unlink(temporary)
            self._sync(self._directory)

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        path = self._path(info.id)
        with _trouble(path), _locked(path) as text:
            old, old_events = _parse(info.id, text)
            if old.sequence != info.sequence:
                raise InfoConflict
            saved = info.but(sequence=info.sequence + 1)
            self._mark(saved)
            os.replace(self._write(saved, [*old_events, *events]), path)
            self._sync(self._directory)
            if old.state is State.WAITING and saved.state is not State.WAITING:
                self._unmark(old)
        return saved

    def load(self, id: str) -> FileInfo:
        return self._read(id)[0]

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        found = (info for info in self._scan(after) if states is None or info.state in states)
        return [*islice(found, limit)]

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found = (info.id for info in self._scan() if info.has_expired(now) and not info.is_gone)
        return [*islice(found, limit)]

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        try:
            finals = sorted(os.listdir(inside(self._waiting, check_id(part))))
        except (UploadNotFound, FileNotFoundError):
            return []
        return [info.id for info in self._known(finals) if info.state is State.WAITING]

    def events(self, id: str) -> Sequence[Event]:
        return sorted(self._read(id)[1], key=lambda event: event.sequence)

    def _path(self, id: str) -> Path:
        return inside(self._directory, check_id(id) + _SUFFIX)

    def _read(self, id: str) -> tuple[FileInfo, Sequence[Event]]:
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
        return self._known(sorted(id for id in ids if id > after))

    def _known(self, ids: Iterable[str]) -> Iterator[FileInfo]:
        """Yield the records of `ids`, without those that are gone or not ours."""
        for count, id in enumerate(ids):
            if count % _SCAN == 0:
                # Many small reads in a row: let other greenlets run.
                let_others_run()
            try:
                yield self._read(id)[0]
            except UploadNotFound:
                pass
            except record.CorruptRecord as error:
                logger.warning("Skipping %s in %s: %s", id + _SUFFIX, self._directory, error)

    def _write(self, info: FileInfo, events: Sequence[Event]) -> Path:
        data = record.dump(info)
        data["events"] = [record.dump_event(event) for event in events]
        path = self._directory / f".{info.id}.{secrets.token_hex(4)}{_TEMPORARY}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(fd, "w", encoding="ascii") as file:
                file.write(record.encode(data) + "\n")
                file.flush()
                if self.force_fsync:
                    os.fsync(fd)
        except BaseException:
            path.unlink()
            raise
        return path

    def _mark(self, info: FileInfo) -> None:
        if info.state is not State.WAITING:
            return
        for part in dict.fromkeys(info.partial_uploads):
            _touch(inside(self._waiting, check_id(part)) / info.id)
            self._sync(self._waiting / part)
        self._sync(self._waiting)

    def _unmark(self, info: FileInfo) -> None:
        for part in dict.fromkeys(info.partial_uploads):
            folder = inside(self._waiting, check_id(part))
            (folder / info.id).unlink(missing_ok=True)
            try:
                folder.rmdir()
            except OSError:
                pass  # another final waits for the part, or somebody was faster

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


def _parse(id: str, text: bytes) -> tuple[FileInfo, Sequence[Event]]:
    data = record.decode(text)
    info = record.load(data)
    if info.id != id:
        raise record.CorruptRecord(f"The record of {info.id} in the file of {id}.")
    return info, [record.load_event(event) for event in data.get("events", ())]


def _touch(path: Path) -> None:
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            path.touch()
        except FileNotFoundError:
            continue  # somebody removed the empty directory in between
        return


@contextmanager
def _locked(path: Path) -> Iterator[bytes]:
    """Exclude other writers of the record; yields its text."""
    deadline = time.monotonic() + _PATIENCE
    while (fd := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise Unavailable
        time.sleep(random.uniform(0.001, 0.005))
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
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextmanager
def _trouble(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.exception("Cannot read or write %s", path)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (StorageFull if full else Unavailable) from error
