"""The one place that decides whether a path stays inside its directory, and whether that
directory takes files.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from pathlib import Path

from tuswsgi.errors import UploadNotFound

#: The flag of ``os.open`` for a file without a name in a directory; 0 where there are none.
UNNAMED: int = getattr(os, "O_TMPFILE", 0)

#: How systems and file systems say that they know no files without a name.
NO_UNNAMED = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL)


def inside(directory: Path, name: str) -> Path:
    """Return `directory`/`name` if that lies in `directory`.

    `name` is a relative path of segments joined by ``/``. No segment may be empty, too
    long for a file system, or begin with a dot: names with dots are the server's own
    (and ``..``). Symbolic links inside of `directory` are the operator's business.

    :raises UploadNotFound: if it is not such a path.
    """
    return directory / contained(name)


@lru_cache(maxsize=1024)  # one request asks several times
def contained(name: str) -> str:
    """Return `name` if ``inside`` takes it: for who puts paths together as text.

    :raises UploadNotFound: as ``inside``.
    """
    for segment in name.split("/"):
        if (
            not segment
            or segment.startswith(".")
            or len(segment.encode("utf-8", "surrogatepass")) > 255
            or not segment.isprintable()
            or "\\" in segment
        ):
            raise UploadNotFound
    return name


def why_unwritable(directory: Path) -> OSError | None:
    """Return why no files can be made in `directory`, ``None`` if they can.

    It leaves none behind. On a network it may take long.
    """
    try:
        # A file that never has a name: nobody sees it, also not after a crash.
        fd = os.open(directory, os.O_RDWR | UNNAMED, 0o600)
    except OSError as error:
        if error.errno not in NO_UNNAMED:
            return error
    else:
        os.close(fd)
        return None
    if os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return None
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))
