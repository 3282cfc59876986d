"""The settings of the protocol: what the heart of the server obeys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from marshmallow import ValidationError

from tuswsgi.core.extensions import OF_STORES, REQUIRES, Extension
from tuswsgi.core.info import MAX_SIZE
from tuswsgi.core.options import Duration, MiB, Size, option


def _at_least_one(value: int) -> None:
    if value < 1:
        raise ValidationError("Not 1 or more.")


def _at_least_a_second(value: float) -> None:
    if value < 1:
        raise ValidationError("Not a duration of at least 1s.")


@dataclass(frozen=True)
class CleanUpSettings:
    """What is removed without being asked for."""

    section: ClassVar[str] = "gc"

    unfinished_age: float | None = option(
        None,
        "How long an unfinished upload stays after its last byte. One with an `expiration`, which "
        "its client was told, lives until that instead. Longer than any request lasts, e.g. `7d`. "
        "Unset: for ever.",
        kind=Duration,
    )
    finished_age: float | None = option(
        None,
        "How long an upload stays after it was finished, e.g. `30d`, and in any case until its "
        "hooks are delivered; those that were given up count as not delivered. Unset: for ever.",
        kind=Duration,
    )
    partial_age: float | None = option(
        None,
        "How long a partial upload stays after its last byte, instead of the two above, and in any "
        "case while a final upload waits for it. Unset: for ever.",
        kind=Duration,
    )
    tombstone_age: float | None = option(
        7 * 86400.0,
        "How long it is known that an upload was removed (410), and in any case until its hooks "
        "are delivered; afterwards it was never there (404). Unset: for ever.",
        kind=Duration,
    )
    grace: float | None = option(
        86400.0,
        "After how long without a change that is removed which only crashes leave behind: records "
        "of unfinished uploads without their bytes, temporary files; bytes without a record are "
        "moved to the quarantine. Longer than any hook lasts. Unset: never.",
        kind=Duration,
    )
    quarantine_age: float | None = option(
        30 * 86400.0,
        "How long bytes without a record stay in the quarantine, `.tuswsgi/quarantine` below the "
        "data directory, where an operator who misses them finds them. Unset: for ever.",
        kind=Duration,
    )
    interval: float = option(
        600.0,
        "How often one of all workers and hosts looks for what is to be removed. What has to be "
        "older than some age is looked for less often: it may stay for a 24th of its age more.",
        kind=Duration,
        validate=_at_least_a_second,
    )


@dataclass(frozen=True)
class UploadSettings:
    """How uploads are created, received, kept and given out."""

    tus_extensions: tuple[Extension, ...] = option(
        tuple(Extension),
        "The extensions that are offered. `expiration` counts only if that is set, and "
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
        "How many partial uploads a final upload may be made of, repeated ones counted each time: "
        "all of them are copied, and `pre-access` is asked about each.",
        validate=_at_least_one,
    )
    remove_parts: bool = option(
        False,
        "Remove partial uploads once a final upload was made of them, unless another "
        "final upload waits for them.",
        rustus="REMOVE_PARTS",
    )
    expiration: float | None = option(
        None,
        "How long an unfinished upload lives after its last byte, e.g. `7d`. Unset: for ever.",
        kind=Duration,
    )
    min_free_disk: int = option(
        64 * MiB,
        "An upload is created only if this much room would be left beside it (507 otherwise).",
        kind=Size,
    )
    network_timeout: float = option(
        60.0,
        "How long a request's body may stay silent before what arrived is kept and the "
        "connection is closed; also how long a client may take nothing of a download.",
        kind=Duration,
    )
    download_unfinished: bool = option(
        False, "Whether GET serves the bytes of an upload that is not finished."
    )

    def offered(self, by_store: Collection[Extension]) -> tuple[Extension, ...]:
        """Return what is switched on, without what lacks its base or the data store's help.

        :param by_store: the extensions that the data store can serve.
        """
        wanted = {ext for ext in self.tus_extensions if ext in by_store or ext not in OF_STORES}
        if self.expiration is None:
            wanted.discard(Extension.EXPIRATION)
        for extension, base in REQUIRES.items():
            if base not in wanted:
                wanted.discard(extension)
        return tuple(extension for extension in Extension if extension in wanted)

    @property
    def max_size(self) -> int:
        """The most bytes that any upload may have."""
        return MAX_SIZE if self.max_file_size is None else self.max_file_size

    def expiry(self, now: float) -> float | None:
        """Return when an upload expires whose last byte came at `now`."""
        if self.expiration is None or Extension.EXPIRATION not in self.tus_extensions:
            return None
        return now + self.expiration
