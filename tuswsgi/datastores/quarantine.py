"""Where files that no record tells of wait, for somebody to miss them.

This file owns a hidden directory of the directory of uploads: ``.tuswsgi/quarantine/<time>/``
has what was moved there at a time, by the same paths as before, so that ``mv`` puts it back.
Everything is renamed within one file system and never copied. What is in there is no upload.
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
from tuswsgi.datastores.base import Place, Quarantined

_ROOT = ".tuswsgi/quarantine"

_TIME = "%Y-%m-%dT%H%M%SZ"

#: A time, and a number where a path was taken already in that second.
_FOLDER = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d{6}Z)(\.\d+)?", re.ASCII)

#: How many files are looked at before others run.
_PAGE = 100


def quarantine(directory: str, place: Place) -> Quarantined | None:
    """Move a file that ``places`` found; see ``DataStore.quarantine``."""
    if not scan.is_still(directory, place):
        return None
    source = f"{directory}/{place.storage.path}"
    moved_at = int(time.time())
    target = _free_path(directory, place, moved_at)
    try:
        _move(source, target)
    except FileNotFoundError:
        return None  # another process was faster
    return Quarantined(place, os.path.abspath(target), moved_at)


def quarantined(directory: str, type: str) -> Iterator[Quarantined]:
    """Yield what was moved; see ``DataStore.quarantined``.

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
        for number, path in enumerate(scan.files(below, "")):
            if number % _PAGE == 0:
                let_others_run()
            if (place := scan.look(below, path, type)) is not None:
                yield Quarantined(place, os.path.abspath(f"{below}/{path}"), moved_at)


def put_back(directory: str, found: Quarantined) -> bool:
    """Move a file to where it was; see ``DataStore.put_back``."""
    target = f"{directory}/{found.place.storage.path}"
    try:
        if os.path.lexists(target):
            return False
        _move(found.location, target)
    except (FileExistsError, NotADirectoryError, FileNotFoundError):
        return False
    _remove_empty_folders(found)
    return True


def discard(found: Quarantined) -> bool:
    """Remove a file for good; see ``DataStore.discard``."""
    rest = scan.beside(found.location)
    try:
        # To free the blocks of a huge file takes the kernel its time.
        run_in_thread(os.unlink, found.location)
        for path in rest:
            run_in_thread(os.unlink, path)
    except FileNotFoundError:
        return False  # another process was faster, or an operator
    _remove_empty_folders(found)
    return True


def _free_path(directory: str, place: Place, moved_at: int) -> str:
    folder = f"{directory}/{_ROOT}/{time.strftime(_TIME, time.gmtime(moved_at))}"
    for number in count():
        path = f"{folder}{f'.{number}' if number else ''}/{place.storage.path}"
        if not os.path.lexists(path):
            return path
    raise AssertionError  # there is always one more number


def _move(source: str, target: str) -> None:
    """Rename a file with what belongs to it, but never over another one.

    Whoever dies in between leaves two names of one file, and no file without what belongs to
    it: what has lost its upload is for the clean-up.
    """
    make_directory(os.path.dirname(target))
    pairs = [*zip(scan.beside(source), scan.beside(source, target), strict=True)]
    pairs.append((source, target))
    named: list[tuple[str, str]] = []
    try:
        for old, new in pairs:
            _name(old, new)
            named.append((old, new))
    except BaseException:
        for old, new in named:
            _unname(new, old)
        raise
    for old, new in reversed(pairs):
        _unname(old, new)


def _name(old: str, new: str) -> None:
    """Give a file one more name, or another one where the file system knows no second names."""
    try:
        os.link(old, new, follow_symlinks=False)
    except FileExistsError:
        # Somebody died here, and left both names.
        if not os.path.samefile(old, new):
            raise
    except (NotADirectoryError, FileNotFoundError):
        raise
    except OSError:
        if os.path.lexists(new):
            raise FileExistsError from None
        os.rename(old, new)


def _unname(old: str, new: str) -> None:
    """Take a name from a file that has another one, or give it that where it has not."""
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
    for _ in range((found.place.storage.path or "").count("/") + 1):
        try:
            os.rmdir(folder)
        except OSError:
            return  # there is more in it
        folder = os.path.dirname(folder)
