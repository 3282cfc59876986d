"""Copies the records of all uploads from one info store to another, for ``tuswsgi info copy``.

Afterwards it reads both stores and compares them. It may be interrupted at any time: each
upload is written at once, the source is not changed, and the next run skips what was copied.
The bytes of uploads are not copied.
"""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from tuswsgi.config.backends import Backends, directory_of
from tuswsgi.config.loading import Config
from tuswsgi.config.server import ServerSettings
from tuswsgi.core.errors import ConfigurationError, InfoConflict, UploadExists, UploadNotFound
from tuswsgi.core.events import Event, HookType
from tuswsgi.core.info import FileInfo
from tuswsgi.infostores.base import InfoStore, prepared
from tuswsgi.infostores.record import CorruptRecord
from tuswsgi.infostores.rustus import NotConvertible, RustusFiles, RustusRecords, RustusRedis
from tuswsgi.infostores.settings import InfoStoreName

#: The prefix of DSNs of rustus' records.
_RUSTUS = "rustus+"

#: A limit that no outbox reaches.
_ALL = 10**9

_TYPES = list(HookType)

#: Takes ids and a label, and yields the ids while it shows the progress.
Progress = Callable[[Sequence[str], str], AbstractContextManager[Iterable[str]]]


@dataclass(frozen=True)
class Upload:
    """What is copied of an upload: its record and its events in order, including dead letters.

    The claims on events are not copied: they belong to workers of the source.
    """

    info: FileInfo
    events: Sequence[Event] = ()

    def is_kept_as(self, kept: Upload) -> bool:
        """Whether `kept` is a copy of this upload.

        Its record may have a higher sequence. The error messages of events may differ, since
        not every database can store every character of them.
        """
        return (
            kept.info.sequence >= self.info.sequence
            and kept.info.replace(sequence=self.info.sequence) == self.info
            and [replace(event, error=None) for event in kept.events]
            == [replace(event, error=None) for event in self.events]
        )


class Source(Protocol):
    """Where uploads are read from."""

    def ids(self) -> Sequence[str]:
        """Return the ids of all uploads, tombstones included."""

    def read(self, id: str) -> Upload:
        """Return an upload.

        :raises UploadNotFound: if there is none.
        :raises CorruptRecord: if its record is damaged.
        :raises NotConvertible: if its record cannot be converted.
        """


class StoredUploads:
    """The uploads of an info store, with the dead letters at the time of construction."""

    def __init__(self, infos: InfoStore) -> None:
        self._infos = infos
        self._dead: defaultdict[str, list[Event]] = defaultdict(list)
        for event in infos.undelivered(dead=True, limit=_ALL):
            self._dead[event.upload].append(event)

    def ids(self) -> Sequence[str]:
        ids: list[str] = []
        while page := self._infos.list(after=ids[-1] if ids else "", limit=10_000):
            ids += [info.id for info in page]
        return ids

    def read(self, id: str) -> Upload:
        info = self._infos.load(id)
        pending = self._infos.events(id)
        dead = sorted(self._dead.get(id, ()), key=_order)
        return Upload(info, [*heapq.merge(pending, dead, key=_order)])


class ConvertedUploads:
    """The uploads of rustus, which keeps no undelivered hooks."""

    def __init__(self, records: RustusRecords) -> None:
        self._records = records

    def ids(self) -> Sequence[str]:
        return self._records.ids()

    def read(self, id: str) -> Upload:
        return Upload(self._records.read(id))


@dataclass
class Report:
    """The result of a copy.

    :param problems: why uploads were not copied, by their ids.
    :param skipped: warnings of the stores about records that they skipped.
    """

    copied: int = 0
    overwritten: int = 0
    present: int = 0
    same: int = 0
    events: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, None] = field(default_factory=dict)
    is_over: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the target has everything that the source has."""
        return self.is_over and not self.problems and not self.skipped

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report, the summary last."""
        yield from self.skipped
        yield from (f"{id}: {reason}" for id, reason in self.problems.items())
        done = f"{self.copied} copied, {self.overwritten} overwritten, {self.present} there already"
        if not self.is_over:
            yield f"Not finished: {done}. Run it again to go on."
            return
        left = len(self.problems) + len(self.skipped)
        yield f"{done}, {left} not copied." if left else f"{done}."
        yield (
            f"Read back and compared: {self.same} uploads with {self.events} undelivered "
            "post-hooks are the same in both."
        )


class Copy:
    """One run from a source to a target.

    :param source: returns the uploads; called for each pass.
    :param overwrite: replace records of the target that differ.
    """

    def __init__(
        self, source: Callable[[], Source], target: InfoStore, *, overwrite: bool = False
    ) -> None:
        self._source = source
        self._target = target
        self._overwrite = overwrite
        self.report = Report()

    def run(self, progress: Progress = lambda ids, label: nullcontext(ids)) -> Report:
        """Copy everything, then read everything back.

        :raises TusError: if a store is not available; what was copied stays.
        """
        with _collected_warnings(self.report):
            source = self._source()
            kept = StoredUploads(self._target)
            ids = source.ids()
            with progress(ids, "Copying") as items:
                for id in items:
                    self._attempt(id, self._copy, source, kept)
            source = self._source()
            kept = StoredUploads(self._target)
            # Uploads that came or went meanwhile show that a server runs, as changed ones do.
            ids = sorted({*ids, *source.ids()})
            with progress(ids, "Comparing") as items:
                for id in items:
                    if id not in self.report.problems:
                        self._attempt(id, self._compare, source, kept)
        self.report.is_over = True
        return self.report

    def _attempt(
        self,
        id: str,
        step: Callable[[str, Source, Source], str | None],
        source: Source,
        kept: Source,
    ) -> None:
        try:
            problem = step(id, source, kept)
        except NotConvertible as error:
            problem = str(error)
        except CorruptRecord as error:
            problem = f"Its record cannot be read: {error}"
        except (UploadExists, InfoConflict):
            problem = "Another process wrote it to the target at the same time."
        if problem is not None:
            self.report.problems[id] = problem

    def _copy(self, id: str, source: Source, kept: Source) -> str | None:
        """Copy an upload; return the problem, if there is one."""
        try:
            upload = source.read(id)
        except UploadNotFound:
            return None  # removed meanwhile; the comparison reports it
        try:
            old = kept.read(id)
        except UploadNotFound:
            self._target.create(upload.info, upload.events)
            self.report.copied += 1
            return None
        if upload.is_kept_as(old):
            self.report.present += 1
        elif self._overwrite:
            self._replace(old, upload)
            self.report.overwritten += 1
        else:
            return "The target has a different record of it; --overwrite replaces it."
        return None

    def _replace(self, old: Upload, upload: Upload) -> None:
        for event in old.events:
            self._target.settle(event)
        held = old.info
        # The sequence of later events must be higher than that of the copied ones.
        while held.sequence < upload.info.sequence - 1:
            held = self._target.save(held)
        self._target.save(upload.info.replace(sequence=held.sequence), upload.events)

    def _compare(self, id: str, source: Source, kept: Source) -> str | None:
        """Compare an upload with its copy; return the problem, if there is one."""
        try:
            upload = source.read(id)
            if upload.is_kept_as(kept.read(id)):
                self.report.same += 1
                self.report.events += len(upload.events)
                return None
        except UploadNotFound:
            pass  # created or removed meanwhile
        return "It changed while it was copied. Stop the servers and run it again."


def _order(event: Event) -> tuple[int, int]:
    """Return the sort key of an event among those of its upload.

    Hooks that were recorded with one change share its sequence, and are sent in the order of
    their types.
    """
    return event.sequence, _TYPES.index(event.type)


class _WarningCollector(logging.Handler):
    """Collects the warnings of stores about records that they skip."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.skipped[record.getMessage()] = None


@contextmanager
def _collected_warnings(report: Report) -> Iterator[None]:
    logger = logging.getLogger("tuswsgi.infostores")
    collector = _WarningCollector(report)
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)


@contextmanager
def opened(
    config: Config,
    source: str | None,
    target: str | None,
    *,
    overwrite: bool = False,
    without_files: bool = False,
) -> Iterator[Copy]:
    """Open two stores to copy from one to the other.

    :param source: a DSN, ``None`` for the configured store. ``rustus+file:///directory`` and
        ``rustus+redis://...`` are the records of rustus.
    :param target: as `source`, but not those of rustus.
    :param without_files: see ``RustusRecords``.
    :raises ConfigurationError: if one of them cannot be used.
    :raises Unavailable: if one of them cannot be reached.
    """
    with ExitStack() as stack:
        read: Callable[[], Source]
        if source is not None and source.startswith(_RUSTUS):
            records = _rustus(source.removeprefix(_RUSTUS), config, without_files)
            stack.callback(records.close)
            read = partial(ConvertedUploads, records)
        else:
            if source is None:
                Backends(config).check_records()
            else:
                _check_there(source)
            read = partial(StoredUploads, stack.enter_context(_store(source, config)))
        kept = stack.enter_context(_store(target, config))
        yield Copy(read, kept, overwrite=overwrite)


def _rustus(dsn: str, config: Config, without_files: bool) -> RustusRecords:
    is_file = dsn.startswith("file:")
    return RustusRecords(
        RustusFiles(directory_of(dsn)) if is_file else RustusRedis(dsn),
        Backends(config).data_dir,
        config.build(ServerSettings).url,
        without_files=without_files,
    )


def _store(dsn: str | None, config: Config) -> AbstractContextManager[InfoStore]:
    backends = Backends(config)
    if dsn is not None:
        return prepared(backends.info_store_at(dsn))
    if backends.info_store_name is InfoStoreName.MEMORY:
        raise ConfigurationError("The records are in the server's memory.")
    return prepared(backends.info_store())


def _check_there(dsn: str) -> None:
    """Refuse a source that does not exist: to open it would make an empty one."""
    scheme, _, path = dsn.partition(":///")
    if scheme == "file":
        path = f"/{path}"
    elif scheme != "sqlite":
        return
    if not Path(path.removesuffix("?mode=rwc")).exists():
        raise ConfigurationError(f"There is nothing to copy at {path}.")
