"""Finds and removes what lies in a directory of uploads, whoever has left it there.

This file owns which files are looked at: those of uploads, and the temporary ones that the
file store puts beside them. Hidden directories and everything else that is hidden are never
touched. Whether anybody needs what was found is not decided here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import count, takewhile

from tuswsgi.core.info import Storage
from tuswsgi.core.process import let_others_run, run_in_thread
from tuswsgi.datastores.base import Place

#: Files beside that of an upload, by their purpose: ids never begin with a dot.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?:concat-\w+|(?P<of_upload>(?:unverified|segment)\d*))", re.DOTALL
)

#: How many files are looked at before others run.
_PAGE = 100


def places(directory: str, type: str, before: float) -> Iterator[Place]:
    """Yield the files in a directory and those below it; see ``DataStore.places``.

    :param type: the name of the data store.
    """
    for number, path in enumerate(files(directory, "")):
        if number % _PAGE == 0:
            let_others_run()
        if (place := look(directory, path, type)) is not None and place.changed_at < before:
            yield place


def clear(directory: str, place: Place) -> bool:
    """Remove a file that ``places`` found; see ``DataStore.clear``."""
    if not is_still(directory, place):
        return False
    try:
        # To free the blocks of a huge file takes the kernel its time.
        run_in_thread(os.unlink, f"{directory}/{place.storage.path}")
    except FileNotFoundError:
        return False  # another process was faster
    return True


def is_still(directory: str, place: Place) -> bool:
    """Return whether a file is as ``places`` found it."""
    return look(directory, place.storage.path or "", place.storage.type) == place


def beside(path: str, other: str | None = None) -> list[str]:
    """Return the files that belong to that of an upload, which are beside it: its segments, and
    what says which bytes do not count.

    :param other: return their names beside this file instead.
    """
    segments = takewhile(
        lambda number: os.path.lexists(_hidden(path, f"segment{number}")), count(1)
    )
    purposes = ["unverified"]
    for number in segments:
        purposes += [f"segment{number}", f"unverified{number}"]
    there = [purpose for purpose in purposes if os.path.lexists(_hidden(path, purpose))]
    return [_hidden(other or path, purpose) for purpose in there]


def _hidden(path: str, purpose: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{purpose}"


def files(directory: str, below: str) -> Iterator[str]:
    """Yield the paths of files, each relative to `directory`; links are not followed."""
    try:
        entries = os.scandir(f"{directory}/{below}")
    except FileNotFoundError:
        return  # somebody removed it in the meantime
    with entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield f"{below}{entry.name}"
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from files(directory, f"{below}{entry.name}/")


def look(directory: str, path: str, type: str) -> Place | None:
    """Return what a file is, ``None`` if it is nothing that may be looked at."""
    folder, slash, name = path.rpartition("/")
    temporary = _TEMPORARY.fullmatch(name)
    if name.startswith(".") and temporary is None:
        return None
    upload = name if temporary is None else temporary["name"]
    try:
        if temporary is not None and temporary["of_upload"]:
            try:
                os.lstat(f"{directory}/{folder}{slash}{upload}")
                return None  # it holds bytes of the upload, or says which ones do not count
            except FileNotFoundError:
                pass
        found = os.lstat(f"{directory}/{path}")
    except FileNotFoundError:
        return None
    storage = Storage(type, path)
    return Place(upload, storage, found.st_size, found.st_mtime, temporary is not None)
