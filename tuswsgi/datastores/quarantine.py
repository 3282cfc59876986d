"""The quarantine: a hidden directory for files without a record.

``.tuswsgi/quarantine/<time>/`` below the directory of uploads has the files that were moved
there at that time, under the same relative paths, so that ``mv`` restores them. They are renamed
within one file system, never copied.
"""

from __future__ import annotations

import calendar
import os
import re
import time
from collections.abc import Iterator
from itertools import count

from tuswsgi.core.paths import make_directory
from tuswsgi.core.process import let_others_run, run_in_thread
from tuswsgi.datastores import scan
from tuswsgi.datastores.base import Quarantined, StoredFile

_ROOT = ".tuswsgi/quarantine"

_TIME = "%Y-%m-%dT%H%M%SZ"

#: A time, and a number where a path was taken already in that second.
_FOLDER = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d{6}Z)(\.\d+)?", re.ASCII)

#: How many files are looked at before other greenlets run.
_PAGE = 100


def quarantine(directory: str, file: StoredFile) -> Quarantined | None:
    """Move a file to the quarantine; see ``DataStore.quarantine``."""
    if not scan.is_unchanged(directory, file):
        return None
    source = f"{directory}/{file.storage.path}"
    moved_at = int(time.time())
    target = _free_path(directory, file, moved_at)
    try:
        _move(source, target)
    except FileNotFoundError:
        return None  # another process was faster
    return Quarantined(file, os.path.abspath(target), moved_at)


def quarantined(directory: str, type: str) -> Iterator[Quarantined]:
    """Yield the files in the quarantine; see ``DataStore.quarantined``.

    :param type: the name of the data store.
    """
    try:
        folders = os.listdir(f"{directory}/{_ROOT}")
    except FileNotFoundError:
        return
    for folder in sorted(folders):
        moved_at = _time_of(folder)
        if moved_at is None:
            continue
        below = f"{directory}/{_ROOT}/{folder}"
        for number, path in enumerate(scan.paths(below, "")):
            if number % _PAGE == 0:
                let_others_run()
            if (file := scan.look_at(below, path, type)) is not None:
                yield Quarantined(file, os.path.abspath(f"{below}/{path}"), moved_at)


def restore(directory: str, found: Quarantined) -> bool:
    """Move a file back to its path; see ``DataStore.restore``."""
    target = f"{directory}/{found.file.storage.path}"
    try:
        if os.path.lexists(target):
            return False
        _move(found.location, target)
    except (FileExistsError, NotADirectoryError, FileNotFoundError):
        return False
    _remove_empty_folders(found)
    return True


def discard(found: Quarantined) -> bool:
    """Delete a file in the quarantine; see ``DataStore.discard``."""
    rest = scan.companions(found.location)
    try:
        # The kernel takes long to free the blocks of a huge file.
        run_in_thread(os.unlink, found.location)
        for path in rest:
            run_in_thread(os.unlink, path)
    except FileNotFoundError:
        return False  # another process was faster, or an operator
    _remove_empty_folders(found)
    return True


def _free_path(directory: str, file: StoredFile, moved_at: int) -> str:
    folder = f"{directory}/{_ROOT}/{time.strftime(_TIME, time.gmtime(moved_at))}"
    for number in count():
        path = f"{folder}{f'.{number}' if number else ''}/{file.storage.path}"
        if not os.path.lexists(path):
            return path
    raise AssertionError  # there is always one more number


def _move(source: str, target: str) -> None:
    """Rename a file and its companions, but never over another file.

    If the process dies in between, a file may have two names, but it never loses a companion (the
    marker and segments beside it).
    Companions without an upload are removed by the clean-up.
    """
    make_directory(os.path.dirname(target))
    pairs = [*zip(scan.companions(source), scan.companions(source, target), strict=True)]
    pairs.append((source, target))
    named: list[tuple[str, str]] = []
    try:
        for old, new in pairs:
            _link(old, new)
            named.append((old, new))
    except BaseException:
        for old, new in named:
            _unlink_old(new, old)
        raise
    for old, new in reversed(pairs):
        _unlink_old(old, new)


def _link(old: str, new: str) -> None:
    """Give a file a second name; rename it if the file system has no hard links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        # A process died here, and left both names.
        if not os.path.samefile(old, new):
            raise
    except (NotADirectoryError, FileNotFoundError):
        raise
    except OSError:
        if os.path.lexists(new):
            raise FileExistsError from None
        os.rename(old, new)


def _unlink_old(old: str, new: str) -> None:
    """Remove the old name of a file that has the new one, too; otherwise rename it."""
    if not os.path.lexists(new):
        os.rename(old, new)
    elif os.path.lexists(old):
        os.unlink(old)


def _time_of(folder: str) -> float | None:
    match = _FOLDER.fullmatch(folder)
    try:
        return match and calendar.timegm(time.strptime(match["time"], _TIME))
    except ValueError:
        return None


def _remove_empty_folders(found: Quarantined) -> None:
    folder = os.path.dirname(found.location)
    for _ in range((found.file.storage.path or "").count("/") + 1):
        try:
            os.rmdir(folder)
        except OSError:
            return  # there is more in it
        folder = os.path.dirname(folder)
