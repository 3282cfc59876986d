"""Lists and deletes the files in a directory of uploads.

Only the files of uploads and the temporary ones beside them are listed. All other hidden files,
and everything in hidden directories, are never touched. Whether a file is still needed is not
decided here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import count, takewhile

from tuswsgi.core.info import Storage
from tuswsgi.core.process import let_others_run, run_in_thread
from tuswsgi.datastores.base import StoredFile

#: Files beside that of an upload; ids never begin with a dot.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?:concat-\w+|(?P<of_upload>(?:unverified|segment)\d*))", re.DOTALL
)

#: How many files are looked at before other greenlets run.
_PAGE = 100


def stored_files(directory: str, type: str, before: float) -> Iterator[StoredFile]:
    """Yield the files in a directory and its subdirectories; see ``DataStore.files``.

    :param type: the name of the data store.
    """
    for number, path in enumerate(paths(directory, "")):
        if number % _PAGE == 0:
            let_others_run()
        if (file := look_at(directory, path, type)) is not None and file.changed_at < before:
            yield file


def delete(directory: str, file: StoredFile) -> bool:
    """Delete a file that has not changed; see ``DataStore.delete_file``."""
    if not is_unchanged(directory, file):
        return False
    try:
        # The kernel takes long to free the blocks of a huge file.
        run_in_thread(os.unlink, f"{directory}/{file.storage.path}")
    except FileNotFoundError:
        return False  # another process was faster
    return True


def is_unchanged(directory: str, file: StoredFile) -> bool:
    """Return whether a file is as it was when it was listed."""
    return look_at(directory, file.storage.path or "", file.storage.type) == file


def companions(path: str, of: str | None = None) -> list[str]:
    """Return the files that exist beside that of an upload: its segments, and the markers of
    unverified bytes.

    :param of: return their names beside this file instead.
    """
    segments = takewhile(
        lambda number: os.path.lexists(_hidden(path, f"segment{number}")), count(1)
    )
    suffixes = ["unverified"]
    for number in segments:
        suffixes += [f"segment{number}", f"unverified{number}"]
    existing = [suffix for suffix in suffixes if os.path.lexists(_hidden(path, suffix))]
    return [_hidden(of or path, suffix) for suffix in existing]


def _hidden(path: str, suffix: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{suffix}"


def paths(directory: str, below: str) -> Iterator[str]:
    """Yield the paths of files, each relative to `directory`; links are not followed."""
    try:
        entries = os.scandir(f"{directory}/{below}")
    except FileNotFoundError:
        return  # it was removed in the meantime
    with entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield f"{below}{entry.name}"
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from paths(directory, f"{below}{entry.name}/")


def look_at(directory: str, path: str, type: str) -> StoredFile | None:
    """Describe a file; ``None`` if it is gone, or must not be touched."""
    folder, slash, name = path.rpartition("/")
    temporary = _TEMPORARY.fullmatch(name)
    if name.startswith(".") and temporary is None:
        return None
    upload = name if temporary is None else temporary["name"]
    try:
        if temporary is not None and temporary["of_upload"]:
            try:
                os.lstat(f"{directory}/{folder}{slash}{upload}")
                return None  # a segment or a marker of an upload that exists
            except FileNotFoundError:
                pass
        found = os.lstat(f"{directory}/{path}")
    except FileNotFoundError:
        return None
    storage = Storage(type, path)
    return StoredFile(upload, storage, found.st_size, found.st_mtime, temporary is not None)
