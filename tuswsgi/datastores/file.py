"""Stores the bytes of each upload in one file below a directory.

The size of the file is the offset of the upload, so no crash can make the two disagree. There
is one exception: while the checksum of a body is not verified, a marker beside the file says
where the unverified bytes begin.

If an upload is taken over from a process that may still write, it continues in another file, a
segment. Of the files before that, only the number of bytes in the record counts. All are joined
to one file when the upload is finished.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

# gevent's os.close looks for watchers of the descriptor, which a file has none of.
from posix import close
from typing import ClassVar

from tuswsgi.core.errors import (
    ConfigurationError,
    OffsetMismatch,
    StorageFull,
    Unavailable,
    UploadExists,
    UploadGone,
    UploadNotFound,
    is_temporary,
    startup_error,
)
from tuswsgi.core.extensions import OF_STORES
from tuswsgi.core.info import MAX_SIZE, FileInfo, Storage
from tuswsgi.core.options import MAIN, Mode, option
from tuswsgi.core.paths import (
    NO_UNNAMED,
    UNNAMED,
    adopt,
    contained,
    make_directory,
    why_unwritable,
)
from tuswsgi.core.process import run_in_thread
from tuswsgi.datastores import quarantine, scan
from tuswsgi.datastores.base import (
    DataStore,
    OpenUpload,
    Quarantined,
    Readable,
    Source,
    StoredFile,
)
from tuswsgi.datastores.segments import SegmentReader, copy_file
from tuswsgi.lockers.base import HELD, Hold

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: In ``Storage.details``: how many bytes count of the upload's file and of each segment, except
#: for the last.
_SEALED = "sealed"


@dataclass
class FileDataStore(DataStore):
    """Files on a local or network file system.

    :param data_dir: the directory of the files; it is created if it is missing.
    :param force_fsync: whether acknowledged bytes must survive a power loss.
    """

    section: ClassVar[str] = MAIN
    type = "file_storage"
    extensions = OF_STORES

    data_dir: Path
    force_fsync: bool = False
    dir_structure: str = option(
        "",
        "Directories for new uploads below the data directory, e.g. `{year}/{month}/{day}` "
        "or `{env[HOSTNAME]}` or `{metadata[project]}`; also `{hour}` and `{minute}` (UTC).",
        rustus="DIR_STRUCTURE",
    )
    file_mode: int | None = option(
        None, "Permissions of new files, e.g. `0640`. Unset: as the umask leaves them.", kind=Mode
    )
    dir_mode: int | None = option(
        None,
        "Permissions of new directories, e.g. `0750`. Unset: as the umask leaves them.",
        kind=Mode,
    )

    def prepare(self) -> None:
        try:
            make_directory(self.data_dir)
            trouble = run_in_thread(why_unwritable, self.data_dir)
        except OSError as error:
            raise startup_error(
                f"The data directory {self.data_dir} cannot be made: {error.strerror}.", error
            ) from error
        if trouble is not None:
            raise startup_error(
                f"The data directory {self.data_dir} is not writable: {trouble.strerror}.", trouble
            ) from trouble
        try:
            self.storage_for(FileInfo(id="id"))
        except UploadNotFound:
            raise ConfigurationError(
                f"dir_structure leads out of the data directory or to a hidden one: "
                f"{self.dir_structure}"
            ) from None

    def check(self) -> None:
        error = run_in_thread(why_unwritable, self.data_dir)
        if error is not None:
            raise Unavailable from error

    def storage_for(self, info: FileInfo) -> Storage:
        return Storage(self.type, contained(info.storage.path or self._relative_path(info)))

    def create(self, info: FileInfo) -> Storage:
        storage = self.storage_for(info)
        close(self._make(storage))
        # A crash while another upload with this path was removed may have left its segments.
        _unlink(*scan.companions(f"{self.data_dir}/{storage.path}"))
        return storage

    def create_open(self, info: FileInfo) -> OpenUpload:
        storage = self.storage_for(info)
        return _OpenFile(self, info.replace(storage=storage), self._make(storage))

    def offset(self, info: FileInfo) -> int:
        if info.storage.details:
            self._check_sealed(info)
        with self._opened(info, os.O_RDONLY) as fd:
            if self.force_fsync:
                # A client will be told that these bytes are safe, but a worker may have been
                # killed between write and sync.
                run_in_thread(os.fdatasync, fd)
            size = os.fstat(fd).st_size
            marked = self._marked(info)
            return _start(info) + (size if marked is None else min(size, marked))

    def append(self, info: FileInfo, offset: int, source: Source, hold: Hold) -> int:
        start = _start(info)
        with self._opened(info, os.O_RDWR) as fd:
            size = os.fstat(fd).st_size
            marked = self._marked(info)
            verified = size if marked is None else min(size, marked)
            if start + verified != offset:
                raise OffsetMismatch(start + verified)
            if size != verified:
                hold.check()
                self._cut(fd, verified)
            if marked is not None and not source.provisional:
                hold.check()
                self._unmark(info)
            return start + self.store(info, fd, verified, source, hold)

    def store(self, info: FileInfo, fd: int, size: int, source: Source, hold: Hold) -> int:
        """Append to an open file of `size` bytes, all of which count, and return its new size."""
        if source.provisional:
            return self._store_provisional(info, fd, size, source, hold)
        size += self._copy(source, fd, size)
        if self.force_fsync:
            run_in_thread(os.fdatasync, fd)
        return size

    def seal(self, info: FileInfo) -> Storage:
        sealed = [*_sealed(info), self.offset(info) - _start(info)]
        storage = replace(info.storage, details={_SEALED: sealed})
        # Neither exclusive nor truncating: several processes may seal the upload at once.
        path = self._path(info.replace(storage=storage), _segment(len(sealed)))
        close(self._make_file(path, 0))
        self._sync_directory(path.parent)
        return storage

    def finish(self, info: FileInfo, hold: Hold) -> Storage:
        if segments := self._segments(info):
            self._build(info, segments, hold)
            return replace(info.storage, details={})
        if self.force_fsync:
            with self._opened(info, os.O_RDONLY) as fd:
                run_in_thread(os.fsync, fd)
        return info.storage

    def delete_leftovers(self, info: FileInfo) -> None:
        run_in_thread(_unlink, *scan.companions(self._text_path(info)))

    def concatenate(self, info: FileInfo, parts: Sequence[FileInfo], hold: Hold) -> None:
        with self._opened(info, os.O_RDONLY):
            pass  # raises if the upload itself is gone
        files = [(self._text_path(part), part.size or 0) for part in parts]
        self._build(info, files, hold)

    def open(self, info: FileInfo, start: int = 0) -> Readable:
        if segments := self._segments(info):
            return SegmentReader(segments, start)
        try:
            file = open(self._path(info), "rb", buffering=0)  # noqa: SIM115  # the caller closes it
        except FileNotFoundError:
            raise UploadGone from None
        file.seek(start)
        return file

    def delete(self, info: FileInfo) -> None:
        path = self._path(info)
        # The kernel takes long to free the blocks of a huge file.
        run_in_thread(_unlink, path, *scan.companions(str(path)))
        if path.parent.exists():
            self._sync_directory(path.parent)

    def files(self, before: float) -> Iterator[StoredFile]:
        return scan.stored_files(str(self.data_dir), self.type, before)

    def delete_file(self, file: StoredFile) -> bool:
        return scan.delete(str(self.data_dir), file)

    def quarantine(self, file: StoredFile) -> Quarantined | None:
        return quarantine.quarantine(str(self.data_dir), file)

    def quarantined(self) -> Iterator[Quarantined]:
        return quarantine.quarantined(str(self.data_dir), self.type)

    def restore(self, found: Quarantined) -> bool:
        return quarantine.restore(str(self.data_dir), found)

    def discard(self, found: Quarantined) -> bool:
        return quarantine.discard(found)

    def location(self, info: FileInfo) -> str | None:
        return str(self._path(info).absolute())

    def free_space(self) -> int | None:
        state = os.statvfs(self.data_dir)
        return state.f_bavail * state.f_frsize

    def _path(self, info: FileInfo, hidden: str = "") -> Path:
        return Path(self._text_path(info, hidden))

    def _text_path(self, info: FileInfo, hidden: str = "") -> str:
        """Return the path of an upload's file; as text, since every request needs it.

        :param hidden: the suffix of a hidden file beside it; ids never begin with a dot.
        """
        path = contained(info.storage.path or info.id)
        if hidden:
            directory, slash, name = path.rpartition("/")
            path = f"{directory}{slash}.{name}.{hidden}"
        return f"{self.data_dir}/{path}"

    def _relative_path(self, info: FileInfo) -> str:
        if not self.dir_structure:
            return info.id
        now = datetime.now(timezone.utc)
        values = {
            name: str(getattr(now, name)) for name in ("year", "month", "day", "hour", "minute")
        }

        def value(match: re.Match[str]) -> str:
            if match["variable"]:
                return os.environ.get(match["variable"], "")
            if match["key"]:
                return _directory(info.metadata.text(match["key"]) or "")
            return values.get(match["name"], match[0])

        # rustus' manual writes env[NAME] without braces, its code writes dates with them.
        pattern = (
            r"\{?env\[(?P<variable>\w+)\]\}?|\{metadata\[(?P<key>[^\]\s,]+)\]\}|\{(?P<name>\w+)\}"
        )
        directories = re.sub(pattern, value, self.dir_structure).strip("/")
        return f"{directories}/{info.id}" if directories else info.id

    def _make(self, storage: Storage) -> int:
        """Create the file of a new upload and return its descriptor.

        :raises UploadExists: if the file exists.
        """
        path = f"{self.data_dir}/{storage.path}"
        try:
            try:
                fd = self._make_file(path, os.O_EXCL)
            except (FileNotFoundError, NotADirectoryError):
                self._make_directory(Path(path).parent)
                fd = self._make_file(path, os.O_EXCL)
            if self.force_fsync:
                try:
                    self._sync_directory(Path(path).parent)
                except BaseException:
                    close(fd)
                    raise
        except FileExistsError:
            raise UploadExists from None
        except OSError as error:
            raise _translated(error) from error
        return fd

    def _make_directory(self, directory: Path) -> None:
        if directory == self.data_dir or directory.is_dir():
            return
        self._make_directory(directory.parent)
        make_directory(directory)
        if self.dir_mode is not None:
            directory.chmod(self.dir_mode)
        self._sync_directory(directory.parent)

    def _make_file(self, path: Path | str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        self._set_mode(fd, os.path.dirname(path))
        return fd

    def _set_mode(self, fd: int, directory: str | Path) -> None:
        adopt(fd, directory)
        if self.file_mode is not None:
            os.fchmod(fd, self.file_mode)

    def _sync_directory(self, directory: Path) -> None:
        if self.force_fsync:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                run_in_thread(os.fsync, fd)
            finally:
                close(fd)

    def _opened(self, info: FileInfo, flags: int) -> _Opened:
        """Open the file that an upload is appended to."""
        hidden = _segment(len(_sealed(info))) if info.storage.details else ""
        return _Opened(self._text_path(info, hidden), flags)

    def _copy(self, source: Source, fd: int, offset: int) -> int:
        try:
            return source.copy_to(fd, offset)
        except OSError as error:
            raise _translated(error) from error

    def _build(self, info: FileInfo, files: Sequence[tuple[str, int]], hold: Hold) -> None:
        """Replace the file of an upload by one that joins the first bytes of other files.

        It gets a random name first: a process that lost the lock may build the same file. Since
        both have the same bytes, it does no harm if that process comes later.

        :param files: their paths, and how many bytes of each.
        """
        path = self._path(info)
        unfinished = self._path(info, f"concat-{secrets.token_hex(8)}")
        try:
            target, has_name = self._make_unnamed(unfinished)
            try:
                # One by one: the kernel lets only one writer into a file, and a second thread
                # would spin on its lock.
                for part, length in files:
                    with _Opened(part, os.O_RDONLY) as fd:
                        if copy_file(fd, target, length) != length:
                            raise UploadGone("Bytes of the upload are missing.")
                if self.force_fsync:
                    run_in_thread(os.fsync, target)
                if not has_name:
                    _name_file(target, unfinished)
            finally:
                close(target)
            hold.check()
            os.replace(unfinished, path)
        except OSError as error:
            raise _translated(error) from error
        finally:
            unfinished.unlink(missing_ok=True)
        self._sync_directory(path.parent)

    def _make_unnamed(self, path: Path) -> tuple[int, bool]:
        """Create a file that gets the name `path` later, and return whether it has it already.

        If the file system supports files without a name, a crash leaves nothing.
        """
        if UNNAMED and os.path.isdir("/proc/self/fd"):
            try:
                fd = os.open(path.parent, os.O_RDWR | os.O_CLOEXEC | UNNAMED, 0o666)
            except OSError as error:
                if error.errno not in NO_UNNAMED:
                    raise
            else:
                self._set_mode(fd, path.parent)
                return fd, False
        return self._make_file(path, os.O_EXCL), True

    def _segments(self, info: FileInfo) -> Sequence[tuple[str, int]]:
        """Return the files of a sealed upload, and how many bytes of each count."""
        sealed = self._sealed_files(info)
        if not sealed:
            return ()
        last = self._text_path(info, _segment(len(sealed)))
        return [*sealed, (last, self.offset(info) - _start(info))]

    def _check_sealed(self, info: FileInfo) -> None:
        for path, length in self._sealed_files(info):
            if not _has_bytes(path, length):
                raise UploadGone

    def _sealed_files(self, info: FileInfo) -> Sequence[tuple[str, int]]:
        """Return the files of a sealed upload but the last, and how many bytes of each count."""
        return [
            (self._text_path(info, _segment(number) if number else ""), length)
            for number, length in enumerate(_sealed(info))
        ]

    def _cut(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        if self.force_fsync:
            # The marker is deleted next; after a power loss it must not be gone before the bytes.
            run_in_thread(os.fdatasync, fd)

    def _store_provisional(
        self, info: FileInfo, fd: int, size: int, source: Source, hold: Hold
    ) -> int:
        hold.check()
        self._mark(info, size)
        copied = 0
        accepted = False
        try:
            copied = self._copy(source, fd, size)
            accepted = source.accepted(lambda: _blocks(fd, size, copied))
        finally:
            # If the lock is lost, the bytes stay marked and never count.
            if not accepted and not hold.is_lost():
                self._cut(fd, size)
        if self.force_fsync:
            run_in_thread(os.fdatasync, fd)
        hold.check()
        self._unmark(info)
        return size + copied if accepted else size

    def _marked(self, info: FileInfo) -> int | None:
        path = self._text_path(info, _marker_of(info))
        # There hardly ever is a marker, and an exception takes longer than this check.
        if not os.access(path, os.F_OK):
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            text = os.read(fd, 32)
        finally:
            close(fd)
        # A crash while the marker was written has left it incomplete, and the file without
        # unverified bytes.
        return int(text) if text.endswith(b"\n") else MAX_SIZE

    def _mark(self, info: FileInfo, offset: int) -> None:
        marker = self._path(info, _marker_of(info))
        try:
            with open(marker, "w", encoding="ascii") as file:
                adopt(file.fileno(), marker.parent)
                file.write(f"{offset}\n")
                file.flush()
                if self.force_fsync:
                    run_in_thread(os.fsync, file.fileno())
        except OSError as error:
            raise _translated(error) from error
        self._sync_directory(marker.parent)

    def _unmark(self, info: FileInfo) -> None:
        marker = self._path(info, _marker_of(info))
        try:
            marker.unlink()
        except FileNotFoundError:
            return
        self._sync_directory(marker.parent)


class _Opened:
    """The descriptor of an upload's file, for the length of a ``with`` block.

    Not a generator, to save memory: every slow connection has one.

    :raises UploadGone: if there is no file.
    """

    __slots__ = ("_fd",)

    def __init__(self, path: str, flags: int) -> None:
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UploadGone from None

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        close(self._fd)


class _OpenFile(OpenUpload):
    """The file of a new upload. It has no marker yet, so none is looked for."""

    def __init__(self, store: FileDataStore, info: FileInfo, fd: int) -> None:
        self.storage = info.storage
        self._files = store
        self._info = info
        self._fd = fd

    def append(self, source: Source) -> int:
        return self._files.store(self._info, self._fd, 0, source, HELD)

    def close(self) -> None:
        close(self._fd)


def _directory(text: str) -> str:
    """Return a client's text as the name of a directory; it must not lead out of the parent."""
    text = re.sub(r"^\.|[/\\]", "_", "".join(char for char in text if char.isprintable()))
    # Two of these fit into one name.
    return text.encode()[:120].decode(errors="ignore") or "_"


def _name_file(fd: int, path: Path) -> None:
    """Give a file without a name one."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Python makes the kernel follow the link in /proc only if a directory is given.
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        close(directory)


def _unlink(*paths: Path | str) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


def _translated(error: OSError) -> Exception:
    if error.errno in _FULL:
        return StorageFull()
    return Unavailable() if is_temporary(error) else error


def _blocks(fd: int, offset: int, n: int) -> Iterator[bytes]:
    end = offset + n
    while offset < end and (block := os.pread(fd, min(1024 * 1024, end - offset), offset)):
        yield block
        offset += len(block)


def _sealed(info: FileInfo) -> Sequence[int]:
    """Return how many bytes count of each file but the last one."""
    sealed: Sequence[int] = info.storage.details.get(_SEALED, ())
    return sealed


def _start(info: FileInfo) -> int:
    """Return the offset of the first byte of the file that is appended to."""
    # Hardly any upload has details, and every request calls this.
    return sum(_sealed(info)) if info.storage.details else 0


def _has_bytes(path: str, length: int) -> bool:
    try:
        return os.stat(path).st_size >= length
    except FileNotFoundError:
        return False


def _segment(number: int) -> str:
    return f"segment{number}"


def _marker_of(info: FileInfo) -> str:
    """Return the suffix of the marker of the file that is appended to."""
    return f"unverified{len(_sealed(info))}" if info.storage.details else "unverified"
