"""Finds and removes uploads, tombstones and files that are no longer needed.

Files without a record may still be needed, so they are moved to a quarantine first. Each search
looks for one kind of thing, page by page, beside the requests. An upload in use is left for the
next search; any other one is checked again under its lock before it is removed. ``sweep``
decides when to search.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import ClassVar, NamedTuple

from marshmallow.validate import Range

from tuswsgi.core.errors import TusError, UploadGone, UploadLocked, UploadNotFound
from tuswsgi.core.events import RequestInfo
from tuswsgi.core.info import FileInfo, State, check_id, made_at
from tuswsgi.core.options import Duration, option
from tuswsgi.core.process import let_others_run
from tuswsgi.datastores.base import Quarantined, StoredFile
from tuswsgi.lockers.base import HELD, Hold
from tuswsgi.observing.telemetry import bytes_reclaimed, quarantine_changed, report
from tuswsgi.protocol.uploads import Uploads

log = logging.getLogger(__name__)

#: The clean-up acts for no request.
_NO_REQUEST = RequestInfo()

#: How many expired uploads are fetched at once.
_EXPIRED = 1000

#: How many files are compared with all records at once.
_FILES = 10_000

#: Up to so many files without a record are normal, or this share of all uploads.
_FEW = 10
_SHARE = 0.01

#: Paths in the data store.
_Paths = Collection[str | None]

#: The most seconds between the making of an id and the creation of its upload.
_MOMENT = 60.0

_UNFINISHED = (State.RECEIVING, State.WAITING)
_FINISHED = (State.FINISHED, State.REFUSED)
_GONE = (State.TERMINATED, State.EXPIRED)


@dataclass(frozen=True)
class CleanUpSettings:
    """What the clean-up removes."""

    section: ClassVar[str] = "gc"

    unfinished_age: float | None = option(
        None,
        "How long an unfinished upload stays after its last byte; one with an expiry (see "
        "`expiration`) stays until that instead. Must be longer than any request lasts, e.g. `7d`. "
        "Unset: for ever.",
        kind=Duration,
    )
    finished_age: float | None = option(
        None,
        "How long an upload stays after it was finished, e.g. `30d`, and in any case until its "
        "hooks are delivered; dead ones count as undelivered. Unset: for ever.",
        kind=Duration,
    )
    partial_age: float | None = option(
        None,
        "The same for partial uploads, after their last byte; in any case they stay while a final "
        "upload waits for them. Unset: for ever.",
        kind=Duration,
    )
    tombstone_age: float | None = option(
        7 * 86400.0,
        "How long the tombstone of a removed upload stays, and in any case until its hooks are "
        "delivered: clients are answered 410, afterwards 404. Unset: for ever.",
        kind=Duration,
    )
    grace: float | None = option(
        86400.0,
        "How long what crashes have left stays after its last change: records of unfinished "
        "uploads without bytes and temporary files are removed then, files without a record are "
        "moved to the quarantine. Must be longer than any hook takes. Unset: for ever.",
        kind=Duration,
    )
    quarantine_age: float | None = option(
        30 * 86400.0,
        "How long files without a record stay in the quarantine, `.tuswsgi/quarantine` below the "
        "data directory, where an operator can find them. Unset: for ever.",
        kind=Duration,
    )
    interval: float = option(
        600.0,
        "How often one process of all workers and hosts cleans up. Things with an age, e.g. "
        "`finished_age`, are searched for less often, and may stay for a 24th of it longer.",
        kind=Duration,
        validate=Range(min=1.0, error="Not a duration of at least 1s."),
    )


class Reason(str, Enum):
    """Why something is removed."""

    EXPIRED = "expired"
    UNFINISHED = "unfinished"  #: nothing has arrived for `unfinished_age`
    FINISHED = "finished"  #: finished for `finished_age`
    PARTIAL = "partial"  #: a partial upload, unchanged for `partial_age`
    DATA_LOST = "data lost"  #: the record of an unfinished upload whose bytes are gone
    NO_RECORD = "no record"  #: a file without a record: moved to the quarantine
    QUARANTINE = "quarantine"  #: in the quarantine for `quarantine_age`
    LEFT_OVER = "left over"  #: the file of an upload that was removed
    TEMPORARY = "temporary"  #: a temporary file that a crash has left
    TOMBSTONE = "tombstone"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Removal:
    """Something that was removed or moved to the quarantine, or would be.

    :param age: seconds since its last change.
    :param bytes: how many bytes of storage it took.
    """

    reason: Reason
    id: str
    age: float
    bytes: int = 0

    @property
    def is_for_good(self) -> bool:
        """Whether it is removed, not moved to the quarantine."""
        return self.reason is not Reason.NO_RECORD


class TooManyStrays(Exception):
    """So many files have no record that records are probably missing.

    :param strays: at least so many files have no record.
    :param known: so many uploads have one.
    """

    def __init__(self, strays: int, known: int) -> None:
        super().__init__(
            f"At least {strays} files of uploads have no record, and {known} uploads have one. "
            "Nothing was moved to the quarantine. Do the records come from a backup, or is it the "
            "wrong info store? If all is as it should be, `tuswsgi gc --quarantine-many` moves "
            "them, and with --dry-run it lists them."
        )


class Search(NamedTuple):
    """A search for one kind of thing.

    :param age: the least age of what it finds, in seconds.
    :param removals: removes one thing after the other, and yields each.
    """

    name: str
    age: float
    removals: Callable[[], Iterator[Removal]]


class CleanUp:
    """Removes what is no longer needed.

    :param dry_run: only yield what would be removed.
    :param quarantine_many: move files without a record to the quarantine, however many there are
        and however young they are.
    :param on_look: called before each thing that is looked at; an exception ends the search.
    """

    def __init__(
        self,
        uploads: Uploads,
        settings: CleanUpSettings,
        *,
        dry_run: bool = False,
        quarantine_many: bool = False,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._uploads = uploads
        self._infos = uploads.infos
        self._data = uploads.data
        self._settings = settings
        self._dry_run = dry_run
        self._quarantine_many = quarantine_many
        self._on_look = on_look

    def searches(self) -> Sequence[Search]:
        """Return the searches that the settings enable, in their order."""
        own = self._settings
        ages = {
            "expired": (0.0, self._expired),
            "unfinished": (
                _least(own.unfinished_age, own.partial_age, own.grace),
                self._unfinished,
            ),
            "finished": (_least(own.finished_age, own.partial_age), self._finished),
            "tombstones": (own.tombstone_age, self._tombstones),
            "quarantine": (_least(own.quarantine_age, own.grace), self._quarantined),
            "strays": (own.grace, self._strays),
        }
        return [Search(name, age, find) for name, (age, find) in ages.items() if age is not None]

    def _expired(self) -> Iterator[Removal]:
        seen: set[str] = set()
        while found := self._infos.expired(time.time(), limit=len(seen) + _EXPIRED):
            fresh = [id for id in found if id not in seen]
            if not fresh:
                break
            seen.update(fresh)
            for id in fresh:
                self._on_look()
                yield from self._remove(id, self._reason)

    def _unfinished(self) -> Iterator[Removal]:
        lost = []
        any_is_there = False
        for info in self._records(_UNFINISHED):
            if self._is_due(info):
                yield from self._remove(info.id, self._reason)
                continue
            with log_failures(info.id):
                is_idle = self._is_idle(info)
                if is_idle or not any_is_there:
                    is_there = self._stored(info) is not None
                    any_is_there = any_is_there or is_there
                    if is_idle and not is_there:
                        lost.append(info.id)
        # If no upload has its bytes, it is the data store that is missing, e.g. a disk that is
        # not mounted. And if records were missing for a time, files were moved.
        lost = lost if any_is_there else []
        if lost:
            self._restore_all()
        for id in lost:
            self._on_look()
            yield from self._remove(id, self._reason_if_lost)

    def _finished(self) -> Iterator[Removal]:
        for info in self._records(_FINISHED):
            if self._is_due(info):
                yield from self._remove(info.id, self._reason)

    def _is_due(self, info: FileInfo) -> bool:
        with log_failures(info.id):
            return self._reason(info) is not None
        return False

    def _reason(self, info: FileInfo) -> Reason | None:
        """Return why to remove an upload, ``None`` to keep it."""
        if info.is_gone:
            return None
        if self._has_expired(info):
            return Reason.EXPIRED
        if not self._is_too_old(info):
            return None
        if info.is_finished and self._has_events(info):
            # The receiver of a hook may want to read the upload.
            return None
        if info.is_partial:
            return None if self._infos.finals_waiting_for(info.id) else Reason.PARTIAL
        return Reason.FINISHED if info.is_finished else Reason.UNFINISHED

    def _has_expired(self, info: FileInfo) -> bool:
        try:
            return self._uploads.has_expired(info)
        except UploadGone:
            # A part of a final upload is gone, so it can never be built.
            return True

    def _is_too_old(self, info: FileInfo) -> bool:
        own = self._settings
        if info.is_partial:
            age = own.partial_age
        else:
            age = own.finished_age if info.is_finished else own.unfinished_age
        if age is None or time.time() - self._changed_at(info) <= age:
            return False
        if info.is_finished:
            return True
        # An expiry that its client was told holds, and a complete upload waits for a hook.
        stored = self._stored(info)
        return info.expires_at is None and (stored is None or stored != info.size)

    def _changed_at(self, info: FileInfo) -> float:
        if info.is_finished or info.state is not State.WAITING:
            return _changed_at(info)
        try:
            # Bytes that arrive at a part keep the final upload alive.
            return max(map(_changed_at, [info, *self._uploads.concatenation.parts_of(info)]))
        except UploadGone:
            return _changed_at(info)

    def _has_events(self, info: FileInfo) -> bool:
        # Live ones first: an event that dies in between is found among the dead.
        return bool(self._infos.events(info.id) or self._infos.events(info.id, dead=True))

    def _is_idle(self, info: FileInfo) -> bool:
        grace = self._settings.grace
        return grace is not None and time.time() - self._changed_at(info) > grace

    def _reason_if_lost(self, info: FileInfo) -> Reason | None:
        is_lost = info.state in _UNFINISHED and self._is_idle(info) and self._stored(info) is None
        return Reason.DATA_LOST if is_lost else None

    def _stored(self, info: FileInfo) -> int | None:
        """Return how many bytes of an upload are stored, ``None`` if its file is gone."""
        try:
            return self._data.offset(info)
        except UploadGone:
            return None

    def _remove(self, id: str, reason_of: Callable[[FileInfo], Reason | None]) -> Iterator[Removal]:
        removal = None
        with log_failures(id), self._uploads.locker.try_lock(id) as hold:
            info = self._infos.load(id)
            reason = reason_of(info)
            if reason is not None:
                age = time.time() - _changed_at(info)
                removal = Removal(reason, id, age, self._stored(info) or 0)
                if not self._dry_run:
                    self._uploads.context.remove(info, State.EXPIRED, _NO_REQUEST, hold)
                    self._tell(removal)
        if removal is not None:
            yield removal

    def _tombstones(self) -> Iterator[Removal]:
        for info in self._records(_GONE):
            age = time.time() - (info.deleted_at or 0.0)
            if self._settings.tombstone_age is None or age <= self._settings.tombstone_age:
                continue
            is_forgotten = False
            with log_failures(info.id), self._uploads.locker.try_lock(info.id):
                if self._dry_run:
                    is_forgotten = not self._has_events(info)
                else:
                    is_forgotten = self._infos.forget(info)
            if is_forgotten:
                removal = Removal(Reason.TOMBSTONE, info.id, age)
                self._tell(removal)
                yield removal

    def _strays(self) -> Iterator[Removal]:
        """Remove what crashes have left, and move files without a record to the quarantine.

        :raises TooManyStrays: before any file is moved.
        """
        # A POST writes its record at its end, maybe after a silence as long as the timeout.
        before = (
            time.time() - (self._settings.grace or 0.0) - self._uploads.settings.network_timeout
        )
        strays: list[StoredFile] = []
        left = {info.storage.path for info in self._records(_GONE) if _has_chosen_path(info)}
        known = _Known()
        found = self._suspects(before, left)
        while page := [*islice(found, _FILES)]:
            if any(not file.is_temporary for file, _ in page):
                known = self._known({file.storage.path for file, _ in page})
            for file, reason in page:
                if file.storage.path in known.taken:
                    continue
                if reason is Reason.NO_RECORD:
                    strays.append(file)
                else:
                    yield from self._delete(file, left)
            if self._quarantine_many:
                yield from self._quarantine_all(strays, known)
                strays = []
            elif len(strays) > max(_FEW, _SHARE * known.number):
                raise TooManyStrays(len(strays), known.number)
        yield from self._quarantine_all(strays, known)

    def _suspects(self, before: float, left: _Paths) -> Iterator[tuple[StoredFile, Reason]]:
        """Yield the files that may have to go.

        A file that is neither temporary nor left over by a removed upload is yielded only if its
        name is an id that was made after the oldest one in the records: if the info store was
        emptied or replaced, or its records expire, the files of finished uploads stay.
        """
        since = self._oldest() if self._infos.lifetime is None else None
        for file in self._data.files(before):
            self._on_look()
            made = made_at(file.upload)
            is_ours = since is not None and made is not None and since < made < before
            reason = self._reason_for_file(file, left)
            if reason is not None and (is_ours or reason is not Reason.NO_RECORD):
                yield file, reason

    def _oldest(self) -> float | None:
        """Return when the oldest id was made that this server made itself and has a record of."""
        after = ""
        while page := self._infos.list(after=after, limit=100):
            for info in page:
                if (made := _made_at(info)) is not None:
                    return made
            after = page[-1].id
            let_others_run()
        return None

    def _reason_for_file(self, file: StoredFile, left: _Paths = ()) -> Reason | None:
        """Return why a file may go, ``None`` to keep it.

        :param left: the paths of removed uploads, as far as hooks chose them.
        """
        if file.is_temporary:
            return Reason.TEMPORARY
        try:
            info = self._infos.load(file.upload)
        except UploadNotFound:
            return Reason.LEFT_OVER if file.storage.path in left else Reason.NO_RECORD
        except ValueError:
            return None  # the record cannot be read
        if not info.is_gone:
            return None
        return Reason.LEFT_OVER if _is_at(info, file) else Reason.NO_RECORD

    def _known(self, paths: Collection[str | None]) -> _Known:
        """Read all records, for uploads whose path is not their id because a hook chose it."""
        number = 0
        newest = 0.0
        taken = set()
        for info in self._records((*_UNFINISHED, *_FINISHED)):
            number += 1
            newest = max(newest, _made_at(info) or 0.0)
            if info.storage.path in paths:
                taken.add(info.storage.path)
        return _Known(number, newest, taken)

    def _delete(self, file: StoredFile, left: _Paths) -> Iterator[Removal]:
        removal = None
        with log_failures(file.upload), self._locked(file) as hold:
            reason = self._reason_for_file(file, left)
            if reason is not None and reason is not Reason.NO_RECORD:
                hold.check()
                if self._dry_run or self._data.delete_file(file):
                    removal = _removal(reason, file)
                    self._tell(removal)
        if removal is not None:
            yield removal

    def _quarantine_all(self, strays: Sequence[StoredFile], known: _Known) -> Iterator[Removal]:
        for file in strays:
            self._on_look()
            # Files younger than every record wait: the records may come from a backup.
            if self._quarantine_many or (made_at(file.upload) or 0.0) <= known.newest:
                yield from self._quarantine(file)

    def _quarantine(self, file: StoredFile) -> Iterator[Removal]:
        is_moved = False
        with log_failures(file.upload), self._locked(file) as hold:
            if self._reason_for_file(file) is Reason.NO_RECORD:
                hold.check()
                is_moved = self._dry_run or self._move(file)
        if is_moved:
            yield _removal(Reason.NO_RECORD, file)

    def _move(self, file: StoredFile) -> bool:
        moved = self._data.quarantine(file)
        if moved is None:
            return False
        self._report_change("quarantined")
        log.warning(
            "%s (%d bytes) has no record: it was moved to %s",
            file.storage.path,
            file.size,
            moved.location,
        )
        # A POST may just have written its record.
        return not self._restore(moved)

    def _quarantined(self) -> Iterator[Removal]:
        for found in self._data.quarantined():
            self._on_look()
            yield from self._restore_or_discard(found)

    def _restore_or_discard(self, found: Quarantined) -> Iterator[Removal]:
        removal = _removal(Reason.QUARANTINE, found.file, time.time() - found.moved_at)
        is_removed = False
        with log_failures(removal.id), self._locked(found.file) as hold:
            hold.check()
            if not self._restore(found) and self._is_over(removal, found.file):
                is_removed = self._dry_run or self._data.discard(found)
                if is_removed:
                    self._tell(removal)
        if is_removed:
            yield removal

    def _is_over(self, removal: Removal, file: StoredFile) -> bool:
        age = self._settings.quarantine_age
        return age is not None and removal.age > age and self._reason_for_file(file) is not None

    def _restore_all(self) -> None:
        for found in self._data.quarantined():
            self._on_look()
            with log_failures(found.file.upload), self._locked(found.file) as hold:
                hold.check()
                self._restore(found)

    def _restore(self, found: Quarantined) -> bool:
        """Move a file back if it has a record by now."""
        if self._dry_run or not self._has_record(found.file) or not self._data.restore(found):
            return False
        self._report_change("put back")
        log.warning("%s has a record now and was put back", found.file.storage.path)
        return True

    def _has_record(self, file: StoredFile) -> bool:
        try:
            info = self._infos.load(file.upload)
        except (UploadNotFound, ValueError):
            return False
        return not info.is_gone and _is_at(info, file)

    @contextmanager
    def _locked(self, file: StoredFile) -> Iterator[Hold]:
        try:
            id = check_id(file.upload)
        except UploadNotFound:
            # A hook chose the path, or the file is temporary: there is no upload to lock.
            yield HELD
            return
        with self._uploads.locker.try_lock(id) as hold:
            yield hold

    def _records(self, states: Collection[State]) -> Iterator[FileInfo]:
        for state in states:
            for info in self._infos.scan(state):
                self._on_look()
                yield info

    def _tell(self, removal: Removal) -> None:
        if self._dry_run:
            return
        if removal.reason is Reason.QUARANTINE:
            self._report_change("discarded")
        if removal.bytes and bytes_reclaimed.receivers:
            report(bytes_reclaimed, self._uploads.context.sender, size=removal.bytes)
        log.info(
            "Removed %s (%s): %.0f s old, %d bytes",
            removal.id,
            removal.reason,
            removal.age,
            removal.bytes,
        )

    def _report_change(self, action: str) -> None:
        if quarantine_changed.receivers:
            report(quarantine_changed, self._uploads.context.sender, action=action)


class _Known(NamedTuple):
    """The uploads that have a record.

    :param number: how many there are.
    :param newest: when the youngest id was made that this server made itself.
    :param taken: which of the paths in question are theirs.
    """

    number: int = 0
    newest: float = 0.0
    taken: Collection[str | None] = ()


@contextmanager
def log_failures(id: str) -> Iterator[None]:
    """Log what goes wrong with one upload, and continue with the next."""
    try:
        yield
    except UploadLocked:
        log.debug("The upload %s is in use", id)
    except TusError as error:
        log.info("The upload %s stays as it is: %s", id, error)
    except Exception:
        log.exception("The upload %s could not be swept", id)


def _removal(reason: Reason, file: StoredFile, age: float | None = None) -> Removal:
    return Removal(
        reason, file.upload, time.time() - file.changed_at if age is None else age, file.size
    )


def _is_at(info: FileInfo, file: StoredFile) -> bool:
    return (info.storage.path or info.id) == file.storage.path


def _has_chosen_path(info: FileInfo) -> bool:
    return (info.storage.path or info.id).rpartition("/")[2] != info.id


def _made_at(info: FileInfo) -> float | None:
    """Return when the id of an upload was made, ``None`` if this server did not make it."""
    made = made_at(info.id)
    # Ids of other servers, and those that hooks choose, may look alike.
    return made if made is not None and abs(made - info.created_at) < _MOMENT else None


def _changed_at(info: FileInfo) -> float:
    return info.finished_at or info.last_byte_at or info.created_at


def _least(*ages: float | None) -> float | None:
    return min((age for age in ages if age is not None), default=None)
