"""Paths below the server's directories: which are safe, which can be written, and who owns them."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tuswsgi.core.errors import UploadNotFound

#: The flag of ``os.open`` for a file without a name in a directory; 0 where there are none.
UNNAMED: int = getattr(os, "O_TMPFILE", 0)

#: The errors of systems and file systems without ``O_TMPFILE``.
NO_UNNAMED = (errno.EISDIR, errno.EOPNOTSUPP, errno.EINVAL)


def inside(directory: Path, name: str) -> Path:
    """Return `directory`/`name` if that lies in `directory`.

    `name` is a relative path of segments joined by ``/``. No segment may be empty, too
    long for a file system, or begin with a dot: such names are ``..`` or the server's own.
    Symbolic links in `directory` are followed.

    :raises UploadNotFound: if `name` is not such a path.
    """
    return directory / contained(name)


@lru_cache(maxsize=1024)  # called several times for each request
def contained(name: str) -> str:
    """Return `name` if ``inside`` accepts it.

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


def adopt(file: int | str | Path, directory: str | Path) -> None:
    """Give a new file or directory the owner, group and mode of the directory that it is in.

    An operator may run commands as root beside a server that runs as another user, which must
    be able to use what root creates. For other users than root it does nothing.
    """
    if os.geteuid() != 0:
        return
    above = os.stat(directory)
    if above.st_uid == above.st_gid == 0:
        return
    os.chown(file, above.st_uid, above.st_gid)
    is_directory = stat.S_ISDIR(os.stat(file).st_mode)
    os.chmod(file, stat.S_IMODE(above.st_mode) & (0o7777 if is_directory else 0o666))


def make_directory(directory: str | Path) -> None:
    """Make a directory and its parents, unless it exists; see ``adopt`` for their owner.

    :raises OSError: if it cannot be made.
    """
    directory = Path(directory)
    if directory.is_dir():
        return
    make_directory(directory.parent)
    try:
        directory.mkdir()
    except FileExistsError:
        if directory.is_dir():  # another process was faster
            return
        raise
    adopt(directory, directory.parent)


def why_unmakeable(directory: Path) -> OSError | None:
    """Return why `directory` cannot be made, ``None`` if it can or exists. It leaves nothing."""
    made: list[Path] = []
    try:
        for path in (*reversed(directory.absolute().parents), directory):
            if not path.is_dir():
                path.mkdir()
                made.append(path)
    except OSError as error:
        return error
    finally:
        for path in reversed(made):
            with suppress(OSError):  # a server may use it by now
                path.rmdir()
    return None


def why_unwritable(directory: Path) -> OSError | None:
    """Return why files cannot be created in `directory`, ``None`` if they can.

    It leaves no file. On a network file system it may take long.
    """
    try:
        # Without a name the file is gone when it is closed, even after a crash.
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
