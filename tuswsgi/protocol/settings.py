"""The options of uploads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from marshmallow.validate import Range

from tuswsgi.core.extensions import OF_STORES, REQUIRES, Extension
from tuswsgi.core.options import Duration, MiB, Size, option


@dataclass(frozen=True)
class UploadSettings:
    """How uploads are created, received, stored and served."""

    tus_extensions: tuple[Extension, ...] = option(
        tuple(Extension),
        "The extensions to offer. `expiration` is offered only if the option of that name is set; "
        "`getting` is the download of uploads.",
        rustus="TUS_EXTENSIONS",
    )
    max_file_size: int | None = option(
        None, "The largest upload. Unset: no limit.", kind=Size, rustus="MAX_FILE_SIZE"
    )
    max_body_size: int | None = option(
        None,
        "The largest body of one request. Unset: no limit, since bodies are never held in memory.",
        kind=Size,
        rustus="MAX_BODY_SIZE",
        short="m",
    )
    allow_empty: bool = option(
        True, "Whether uploads of length 0 may be created.", rustus="ALLOW_EMPTY"
    )
    max_parts: int = option(
        1000,
        "How many parts a final upload may have, repeated ones counted each time: all are copied, "
        "and `pre-access` is sent for each.",
        validate=Range(min=1, error="Not 1 or more."),
    )
    remove_parts: bool = option(
        False,
        "Remove partial uploads once a final upload is built of them, unless another final upload "
        "waits for them.",
        rustus="REMOVE_PARTS",
    )
    expiration: float | None = option(
        None,
        "How long an unfinished upload lives after its last byte, e.g. `7d`. Unset: for ever.",
        kind=Duration,
    )
    min_free_disk: int = option(
        64 * MiB,
        "An upload is created only if this much space stays free after it (507 otherwise).",
        kind=Size,
    )
    network_timeout: float = option(
        60.0,
        "How long no byte of a request's body may arrive before the connection is closed; the "
        "bytes before that are stored. Also how long a client may read nothing of a download.",
        kind=Duration,
    )
    download_unfinished: bool = option(
        False, "Whether GET serves the bytes of an upload that is not finished."
    )

    def offered(self, by_store: Collection[Extension]) -> tuple[Extension, ...]:
        """Return the extensions in `tus_extensions` that work: their base is offered, and the data
        store supports them.

        :param by_store: the extensions that the data store supports.
        """
        wanted = {ext for ext in self.tus_extensions if ext in by_store or ext not in OF_STORES}
        if self.expiration is None:
            wanted.discard(Extension.EXPIRATION)
        for extension, base in REQUIRES.items():
            if base not in wanted:
                wanted.discard(extension)
        return tuple(extension for extension in Extension if extension in wanted)
