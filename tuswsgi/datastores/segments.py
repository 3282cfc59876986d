"""Reads and copies bytes from several files, one after the other."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from io import FileIO

from tuswsgi.core.errors import UploadGone
from tuswsgi.core.process import run_in_thread

#: How much is copied at once: a copy can be interrupted between two slices.
_SLICE = 16 * 1024 * 1024

_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class SegmentReader:
    """A ``datastores.base.Readable`` on the first bytes of several files.

    :param segments: their paths, and how many bytes of each.
    :param start: how many bytes to skip.
    :raises UploadGone: if one of the files is not there.
    """

    def __init__(self, segments: Sequence[tuple[str, int]], start: int) -> None:
        self._files: list[tuple[FileIO, int]] = []
        try:
            for path, length in segments:
                skipped = min(start, length)
                start -= skipped
                file = FileIO(path)
                file.seek(skipped)
                self._files.append((file, length - skipped))
        except FileNotFoundError:
            self.close()
            raise UploadGone from None

    def read(self, n: int = -1, /) -> bytes:
        while self._files:
            file, left = self._files[0]
            block = file.read(left if n < 0 else min(n, left))
            if block:
                self._files[0] = file, left - len(block)
                return block
            self._files.pop(0)
            file.close()
        return b""

    def close(self) -> None:
        for file, _ in self._files:
            file.close()
        self._files.clear()


def copy_file(source: int, target: int, length: int) -> int:
    """Append the first bytes of one file to another and return how many they were.

    :param length: how many to copy; there may be fewer.
    """
    copied = 0
    while copied < length:
        moved = run_in_thread(_copy_slice, source, target, copied, min(_SLICE, length - copied))
        if moved == 0:
            break
        copied += moved
    return copied


def _copy_slice(source: int, target: int, offset: int, n: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, n, offset_src=offset)
        except OSError as error:
            if error.errno not in _NO_COPY_FILE_RANGE:
                raise
    block = os.pread(source, n, offset)
    view = memoryview(block)
    while view:
        view = view[os.write(target, view) :]
    return len(block)
