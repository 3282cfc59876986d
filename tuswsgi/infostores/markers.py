"""Markers: empty files by which the file store finds uploads without reading all records.

The store sets a marker before it writes the record. So a crash can leave a marker too many or
too early, but never one too few or too late.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tuswsgi.core.paths import adopt, make_directory

#: The time of a marker that is never due; every file system can store it.
_NEVER = float(2**32 - 1)


class PendingMarkers:
    """Markers of uploads that have events: files with the names of the uploads.

    The modification time of a marker is the time from which on an event can be claimed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def prepare(self) -> None:
        """Create the directory. May be called again."""
        make_directory(self._directory)

    def set(self, id: str, at: float | None) -> bool:
        """Mark an upload whose next event can be claimed from the time `at` on.

        :param at: ``None`` if all events are dead.
        :returns: whether the marker is new.
        """
        at = _NEVER if at is None else min(at, _NEVER)
        path = self._directory / id
        try:
            os.utime(path, (at, at))
        except FileNotFoundError:
            # By the descriptor: another process may remove the file at once.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                adopt(fd, self._directory)
                os.utime(fd, (at, at))
            finally:
                os.close(fd)
            return True
        return False

    def postpone(self, id: str, at: float) -> None:
        """Set the time of a marker, if there is one."""
        try:
            os.utime(self._directory / id, (at, at))
        except FileNotFoundError:
            pass

    def remove(self, id: str) -> None:
        """Remove a marker, if there is one."""
        (self._directory / id).unlink(missing_ok=True)

    def all(self) -> list[str]:
        """Return the marked uploads."""
        return os.listdir(self._directory)

    def remove_abandoned(self, before: float, is_known: Callable[[str], bool]) -> None:
        """Remove the markers of uploads whose creation failed.

        :param before: only markers that were set before this time.
        :param is_known: returns whether an upload has a record.
        """
        for id in self.all():
            try:
                if os.stat(self._directory / id).st_ctime < before and not is_known(id):
                    self.remove(id)
            except FileNotFoundError:
                pass  # another process has removed it

    def due(self, now: float) -> list[str]:
        """Return the uploads that have an event to claim, those that are due longest first."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                try:
                    at = entry.stat().st_mtime
                except FileNotFoundError:
                    continue  # another process has removed it
                if at <= now:
                    found.append((at, entry.name))
        return [id for _, id in sorted(found)]


class WaitingMarkers:
    """Markers of final uploads that may wait for a part: files ``<part>/<final>``."""

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
                continue  # another process has removed the empty directory
            return

    def remove(self, part: str, final: str) -> None:
        """Remove the marker that ``add`` made."""
        folder = self._directory / part
        (folder / final).unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:
            pass  # another final waits for the part, or another process has removed it

    def finals(self, part: str) -> list[str]:
        """Return the final uploads that may wait for `part`, sorted."""
        try:
            return sorted(os.listdir(self._directory / part))
        except FileNotFoundError:
            return []
