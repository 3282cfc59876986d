"""The record of an upload, ``FileInfo``, with its metadata and its id.

Where records are stored is the business of ``infostores``, and how they look in HTTP that of
``web.headers``.
"""

from __future__ import annotations

import binascii
import os
import re
import time
from base64 import b32hexencode, b64decode, b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tuswsgi.core.errors import InvalidMetadata, UploadNotFound

#: The largest length and offset: they are stored in signed 64-bit columns.
MAX_SIZE = 2**63 - 1

#: The bytes of a new id: the time in milliseconds, and random ones.
_TIME_BYTES = 6
_RANDOM_BYTES = 16

#: How many digits of it, of 5 bits each, hold the time, and how many of these bits are random.
_TIME_DIGITS = 10
_OVERHANG = 2

_NEW_ID = re.compile(r"[0-9a-v]{36}", re.ASCII)

_ID = re.compile(r"(?![.~])[A-Za-z0-9._~%!$'()*+,;=:@-]{1,128}", re.ASCII)

#: What ``check_id`` checks, for messages.
ID_RULE = (
    "it has 1 to 128 of the characters A-Z a-z 0-9 - . _ ~ % ! $ ' ( ) * + , ; = : @ and does not "
    "begin with a dot or a tilde"
)


def new_id() -> str:
    """Return a new id, in a form that every URL and file system accepts.

    It begins with the time, so that a database stores the records of successive uploads side by
    side. 128 random bits follow, since whoever knows the id can use the upload, unless the
    application checks more. The digits are those of base32hex (RFC 4648, 7) in lower case: they
    sort as numbers do, and 1,000 URLs with them fit in an ``Upload-Concat`` of 64 KiB.
    """
    now = (time.time_ns() // 1_000_000).to_bytes(_TIME_BYTES, "big")
    return b32hexencode(now + os.urandom(_RANDOM_BYTES)).decode().rstrip("=").lower()


def made_at(id: str) -> float | None:
    """Return when ``new_id`` made an id; ``None`` if it certainly did not make it."""
    if _NEW_ID.fullmatch(id) is None:
        return None
    return (int(id[:_TIME_DIGITS], 32) >> _OVERHANG) / 1000


def check_id(id: str) -> str:
    """Return `id` if it can be the id of an upload.

    An id is one path segment of 1 to 128 of the characters that tusd allows (``%`` and those
    of RFC 3986, 3.3, except for ``&``; no slash). It does not begin with a dot or a tilde, so
    it is a valid file name and never ``..``.

    :raises UploadNotFound: if it cannot, since no upload has such an id.
    """
    if _ID.fullmatch(id) is None:
        raise UploadNotFound
    return id


class State(str, Enum):
    """The state of an upload.

    There is no state for *finishing*: the upload is ``RECEIVING``, and all its bytes are in the
    data store.
    """

    RECEIVING = "receiving"  #: takes bytes, or is about to be finished
    WAITING = "waiting"  #: a final upload that is not built yet
    FINISHED = "finished"
    REFUSED = "refused"  #: complete, but pre-finish refused it
    TERMINATED = "terminated"  #: a tombstone: a client or a hook removed it
    EXPIRED = "expired"  #: a tombstone: the clean-up removed it

    def __str__(self) -> str:
        return self.value


class Metadata(Mapping[str, bytes]):
    """The pairs of ``Upload-Metadata``: text keys in their order, values of any bytes.

    The text of the header is stored ("responses to HEAD requests MUST include the
    Upload-Metadata header and its value as specified by the Client", Creation), and parsed when
    a value is needed.
    """

    __slots__ = ("_values", "raw")

    def __init__(self, raw: str = "") -> None:
        self.raw = raw
        self._values: dict[str, bytes] | None = None

    @classmethod
    def parse(cls, raw: str) -> Metadata:
        """Parse the header that a client sent.

        :raises InvalidMetadata: with a message that says what is wrong.
        """
        metadata = cls(raw)
        metadata._values = _parse_pairs(raw)
        return metadata

    @classmethod
    def of(cls, values: Mapping[str, bytes | str]) -> Metadata:
        """Return the metadata of `values`; text is encoded as UTF-8."""
        pairs = []
        for key, value in values.items():
            data = value.encode() if isinstance(value, str) else value
            pairs.append(f"{key} {b64encode(data).decode()}" if data else key)
        return cls.parse(",".join(pairs))

    def text(self, key: str) -> str | None:
        """Return a value as text, undecodable bytes replaced; ``None`` if it is missing."""
        value = self.get(key)
        return None if value is None else value.decode("utf-8", "replace")

    def _mapping(self) -> dict[str, bytes]:
        if self._values is None:
            self._values = _parse_pairs(self.raw)
        return self._values

    def __getitem__(self, key: str) -> bytes:
        return self._mapping()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping())

    def __len__(self) -> int:
        return len(self._mapping())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metadata) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"Metadata({self.raw!r})"


def _parse_pairs(raw: str) -> dict[str, bytes]:
    values: dict[str, bytes] = {}
    if not raw.strip(" \t"):
        # The specification asks for one or more pairs; tuspy sends an empty header.
        return values
    for pair in raw.split(","):
        key, _, encoded = pair.strip(" \t").partition(" ")
        # "The key MUST NOT contain spaces and commas and MUST NOT be empty.
        # The key SHOULD be ASCII encoded" (Upload-Metadata)
        if not key:
            raise InvalidMetadata("The Upload-Metadata header has an empty key.")
        if not key.isascii() or not key.isprintable():
            raise InvalidMetadata("The Upload-Metadata header has a key that is not ASCII.")
        # "All keys MUST be unique." (Upload-Metadata)
        if key in values:
            raise InvalidMetadata(f"The Upload-Metadata header repeats the key {key}.")
        try:
            values[key] = b64decode(encoded.strip(" \t"), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidMetadata(
                f"The Upload-Metadata header's value of {key} is not Base64."
            ) from None
    return values


@dataclass(frozen=True)
class Storage:
    """Where a data store has the bytes of an upload.

    :param type: the store's name in hooks, e.g. ``file_storage`` (rustus' names).
    :param path: relative to the root of the store.
    :param details: what else the store needs to find the bytes and append to them.
    """

    type: str = ""
    path: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FinalResponse:
    """What a pre-finish hook answers to the client, stored to be repeated.

    :param status: the HTTP status, ``None`` for the protocol's own.
    """

    status: int | None = None
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileInfo:
    """The record of one upload.

    It is frozen: hooks read it later and in other greenlets. Times are seconds since
    the epoch (UTC).

    :param size: the length in bytes; ``None`` while it is deferred.
    :param offset: how many bytes are stored. While the upload is unfinished this is a hint:
        only the data store knows.
    :param concat: the ``Upload-Concat`` header as it was received, ``None`` without.
    :param partial_uploads: the ids of a final upload's parts, in order.
    :param owner: who created it, as the embedding application or a hook calls them.
    :param response: of pre-finish, if it gave one.
    :param reserved: how many bytes of the quota are reserved while the length is deferred.
    :param last_byte_at: when the last byte was stored.
    :param sequence: how often the record was written; an info store saves the record only if
        the stored one has the same sequence.
    """

    id: str
    size: int | None = None
    offset: int = 0
    metadata: Metadata = field(default_factory=Metadata)
    is_partial: bool = False
    is_final: bool = False
    concat: str | None = None
    partial_uploads: tuple[str, ...] = ()
    storage: Storage = field(default_factory=Storage)
    owner: str | None = None
    state: State = State.RECEIVING
    response: FinalResponse | None = None
    reserved: int = 0
    created_at: float = 0.0
    last_byte_at: float | None = None
    expires_at: float | None = None
    finished_at: float | None = None
    deleted_at: float | None = None
    sequence: int = 0

    def replace(self, **changes: Any) -> FileInfo:
        """Return a copy with some fields changed: ``dataclasses.replace``, ten times as fast."""
        copy = object.__new__(FileInfo)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    @classmethod
    def restored(cls, fields: dict[str, Any]) -> FileInfo:
        """Return a record with exactly these fields, much faster than the constructor."""
        info = object.__new__(cls)
        info.__dict__.update(fields)
        return info

    @property
    def is_finished(self) -> bool:
        """Whether the upload is finished or refused: its bytes never change again."""
        return self.finished_at is not None

    @property
    def is_gone(self) -> bool:
        """Whether this is a tombstone."""
        return self.deleted_at is not None

    @property
    def promised(self) -> int:
        """How many bytes count in the quota: the length, or what is stored or reserved."""
        if self.is_gone:
            return 0
        return max(self.offset, self.reserved) if self.size is None else self.size

    def has_expired(self, now: float) -> bool:
        """Return whether an unfinished upload has reached its expiry."""
        return not self.is_finished and self.expires_at is not None and self.expires_at <= now
