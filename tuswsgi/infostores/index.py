"""Markers: empty files by which the file store finds uploads without reading all of them.

This file owns the markers. That a crash leaves one too many or too early, and never one too
few or too late, is the business of the file store, which sets them before its records.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tuswsgi.core.paths import adopt, make_directory

#: The time of what is never to be claimed. Every file system can tell it.
_NEVER = float(2**32 - 1)


class PendingMarkers:
    """``<upload>``: it has events, and its time of change is when to look at them.

    That is the time from which on one of them can be claimed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def prepare(self) -> None:
        """Create the directory. May be called again."""
        make_directory(self._directory)

    def set(self, id: str, at: float | None) -> bool:
        """Mark an upload, to be looked at from the time `at` on.

        :param at: ``None`` for never.
        :returns: whether it was not marked before.
        """
        at = _NEVER if at is None else min(at, _NEVER)
        path = self._directory / id
        try:
            os.utime(path, (at, at))
        except FileNotFoundError:
            # By the descriptor: somebody else may remove it at once.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                adopt(fd, self._directory)
                os.utime(fd, (at, at))
            finally:
                os.close(fd)
            return True
        return False

    def postpone(self, id: str, at: float) -> None:
        """Set a marker, if there is one."""
        try:
            os.utime(self._directory / id, (at, at))
        except FileNotFoundError:
            pass  # there is nothing to postpone

    def remove(self, id: str) -> None:
        """Unmark an upload; one that has no marker is no error."""
        (self._directory / id).unlink(missing_ok=True)

    def all(self) -> list[str]:
        """Return the uploads that are marked."""
        return os.listdir(self._directory)

    def remove_abandoned(self, before: float, is_known: Callable[[str], bool]) -> None:
        """Remove markers that were set before a time and whose uploads are not known: the
        creation of the upload failed.
        """
        for id in self.all():
            try:
                if os.stat(self._directory / id).st_ctime < before and not is_known(id):
                    self.remove(id)
            except FileNotFoundError:
                pass  # somebody else removed it

    def due(self, now: float) -> list[str]:
        """Return the uploads that are to be looked at, those that have waited longest first."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                try:
                    at = entry.stat().st_mtime
                except FileNotFoundError:
                    continue  # somebody removed it in the meantime
                if at <= now:
                    found.append((at, entry.name))
        return [id for _, id in sorted(found)]


class WaitingMarkers:
    """``<part>/<final>``: a final upload may wait for a part."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def prepare(self) -> None:
        """Create the directory. May be called again."""
        make_directory(self._directory)

    def add(self, part: str, final: str) -> None:
        """Mark that `final` may wait for `part`."""
        path = self._directory / part / final
        while True:
            try:
                make_directory(path.parent)
                path.touch()
                adopt(path, path.parent)
            except FileNotFoundError:
                continue  # somebody removed the empty directory in between
            return

    def remove(self, part: str, final: str) -> None:
        """Unmark what ``add`` marked."""
        folder = self._directory / part
        (folder / final).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:
            pass  # another final waits for the part, or somebody was faster

    def finals(self, part: str) -> list[str]:
        """Return the final uploads that may wait for `part`, sorted."""
        try:
            return sorted(os.listdir(self._directory / part))
        except FileNotFoundError:
            return []
