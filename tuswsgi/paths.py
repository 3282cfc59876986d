"""The one place that decides whether a path stays inside its directory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tuswsgi.errors import UploadNotFound


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
