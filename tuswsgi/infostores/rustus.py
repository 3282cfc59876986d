"""Reads the records of rustus, releases 0.1 to 1.1, and converts them to ours.

The bytes stay where rustus put them: a converted record refers to a file below the same data
directory. Source: rustus, ``src/file_info.rs``, ``src/info_storage/impls`` and
``src/data_storage/impls/file_storage.rs``.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from tuswsgi.core.errors import ConfigurationError, InvalidMetadata, Unavailable, UploadNotFound
from tuswsgi.core.info import MAX_SIZE, FileInfo, Metadata, State, Storage, check_id
from tuswsgi.core.paths import contained

if TYPE_CHECKING:
    import redis

#: The name of rustus' file storage. Releases before 0.4 have no other, and store no name.
_FILE_STORAGE = "file_storage"

_SUFFIX = ".info"

#: The ids of uploads: UUIDs, without hyphens in the first releases. Other keys in rustus' Redis
#: are not its own.
_UUID = re.compile(rb"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}")

#: The longest wait for an answer of Redis, in seconds.
_PATIENCE = 10.0

_size = validate.Range(0, MAX_SIZE)


class NotConvertible(Exception):
    """A record that cannot be converted. The message is a sentence that says why."""


class RustusRecord(Schema):
    """The JSON of a record. Releases 0.1 to 0.3 do not write all fields."""

    class Meta:
        unknown = EXCLUDE

    id = fields.String(required=True)
    offset = fields.Integer(required=True, strict=True, validate=_size)
    length = fields.Integer(required=True, strict=True, validate=_size, allow_none=True)
    path = fields.String(required=True, allow_none=True)
    created_at = fields.Integer(required=True, strict=True)
    is_partial = fields.Boolean(load_default=False)
    is_final = fields.Boolean(load_default=False)
    parts = fields.List(fields.String(), load_default=None, allow_none=True)
    storage = fields.String(load_default=_FILE_STORAGE)
    metadata = fields.Dict(fields.String(), fields.String(), required=True)


_schema = RustusRecord()


class RustusTexts(ABC):
    """Where rustus keeps the JSON of its records."""

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Return the ids of all records, sorted.

        :raises ConfigurationError: if the directory or database does not exist.
        :raises Unavailable: if it cannot be read now.
        """

    @abstractmethod
    def text(self, id: str) -> bytes:
        """Return the JSON of a record.

        :raises UploadNotFound: if there is none.
        :raises Unavailable: if it cannot be read now.
        """

    def close(self) -> None:
        """Release what this process holds."""


class RustusFiles(RustusTexts):
    """The directory of rustus' ``file-info-storage``: a file ``<id>.info`` per upload."""

    def __init__(self, info_dir: Path) -> None:
        self._directory = info_dir

    def ids(self) -> Sequence[str]:
        try:
            names = os.listdir(self._directory)
        except OSError as error:
            raise ConfigurationError(
                f"The directory {self._directory} cannot be read: {error.strerror}."
            ) from error
        return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))

    def text(self, id: str) -> bytes:
        try:
            return (self._directory / f"{id}{_SUFFIX}").read_bytes()
        except FileNotFoundError:
            raise UploadNotFound from None
        except OSError as error:
            raise NotConvertible(f"Its record cannot be read: {error.strerror}.") from error


class RustusRedis(RustusTexts):
    """The database of rustus' ``redis-info-storage``: a key per upload, which is its id."""

    def __init__(self, dsn: str) -> None:
        import redis

        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                dsn, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE
            )
        except ValueError as error:
            raise ConfigurationError(f"The DSN of rustus' Redis is wrong: {error}") from error

    def ids(self) -> Sequence[str]:
        with _trouble():
            keys = {*self._redis.scan_iter(count=1000, _type="string")}
        return sorted(key.decode() for key in keys if _UUID.fullmatch(key))

    def text(self, id: str) -> bytes:
        with _trouble():
            text = self._redis.get(id)
        if text is None:
            raise UploadNotFound
        assert isinstance(text, bytes)
        return text

    def close(self) -> None:
        self._redis.close()


class RustusRecords:
    """The converted records of a rustus.

    :param data_dir: rustus' data directory, which this server is to use too.
    :param url: the path of uploads, for the URLs of a final upload's parts.
    :param without_files: also convert finished uploads whose files are missing, because the
        application has moved them; downloads of these are answered 410.
    """

    def __init__(
        self, texts: RustusTexts, data_dir: Path, url: str, *, without_files: bool = False
    ) -> None:
        self._texts = texts
        self._data_dir = data_dir.absolute()
        self._url = url.rstrip("/")
        self._without_files = without_files

    def ids(self) -> Sequence[str]:
        """Return the ids of all records, sorted.

        :raises ConfigurationError: if the directory or database does not exist.
        :raises Unavailable: if it cannot be read now.
        """
        return self._texts.ids()

    def read(self, id: str) -> FileInfo:
        """Return a converted record.

        :raises UploadNotFound: if there is none.
        :raises NotConvertible: if it cannot be converted.
        :raises Unavailable: if it cannot be read now.
        """
        data = _parse(id, self._texts.text(id))
        if data["storage"] != _FILE_STORAGE:
            raise NotConvertible(f"Its bytes are in {data['storage']}, not in files.")
        path, stat = self._find(id, data["path"] or "")
        is_finished = data["length"] is not None and data["offset"] == data["length"]
        if stat is None and not (is_finished and self._without_files):
            raise NotConvertible(
                f"Its file {data['path']} is not below the data directory {self._data_dir}."
            )
        self._check(data, stat, is_finished)
        written_at = float(data["created_at"]) if stat is None else stat.st_mtime
        return FileInfo(
            id=id,
            size=data["length"],
            offset=data["length"] if stat is None else stat.st_size,
            metadata=_metadata(data["metadata"]),
            is_partial=data["is_partial"],
            is_final=data["is_final"],
            concat=self._concat(data),
            partial_uploads=tuple(data["parts"] or ()),
            storage=Storage(_FILE_STORAGE, path),
            state=State.FINISHED if is_finished else State.RECEIVING,
            created_at=float(data["created_at"]),
            last_byte_at=written_at,
            finished_at=written_at if is_finished else None,
        )

    def close(self) -> None:
        """Release what this process holds."""
        self._texts.close()

    def _check(self, data: dict[str, Any], stat: os.stat_result | None, is_finished: bool) -> None:
        """Refuse uploads that rustus left inconsistent.

        :raises NotConvertible: for these.
        """
        if data["is_final"] and not is_finished:
            raise NotConvertible("It is a final upload whose parts were never concatenated.")
        if stat is None or data["length"] is None:
            return
        # rustus has no locks: two requests at once make the file longer than the upload.
        if stat.st_size > data["length"] or (is_finished and stat.st_size != data["length"]):
            raise NotConvertible(
                f"Its file has {stat.st_size} bytes where the upload has {data['length']}."
            )

    def _find(self, id: str, path: str) -> tuple[str, os.stat_result | None]:
        """Return the path of an upload's file below the data directory, and its status.

        rustus stores absolute paths, and the directory may have been moved or mounted elsewhere
        since. So the longest end of the path that exists is taken; the name of the file is
        the upload's id, which no other upload has.
        """
        parts = PurePosixPath(path).parts
        if parts and parts[-1] == id:
            for start in range(len(parts)):
                relative = "/".join(parts[start:])
                try:
                    file = self._data_dir / contained(relative)
                except UploadNotFound:
                    continue
                if file.is_file():
                    return relative, file.stat()
        return id, None

    def _concat(self, data: dict[str, Any]) -> str | None:
        """Return ``Upload-Concat`` as the client sent it, as far as rustus has stored it."""
        if data["is_final"]:
            return "final;" + " ".join(f"{self._url}/{part}" for part in data["parts"] or ())
        return "partial" if data["is_partial"] else None


def _parse(id: str, text: bytes) -> dict[str, Any]:
    try:
        data: dict[str, Any] = _schema.loads(text.decode())
    except (ValueError, ValidationError) as error:
        raise NotConvertible(f"It is not a record of rustus: {error}") from error
    if data["id"] != id:
        raise NotConvertible(f"It is the record of {data['id']}.")
    try:
        check_id(id)
    except UploadNotFound:
        raise NotConvertible("Its id is not valid for an upload.") from None
    return data


def _metadata(values: dict[str, str]) -> Metadata:
    try:
        return Metadata.of(values)
    except (InvalidMetadata, UnicodeEncodeError) as error:
        raise NotConvertible(f"Its metadata cannot be sent: {error}") from error


@contextmanager
def _trouble() -> Iterator[None]:
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"rustus' Redis does not answer: {error}") from error
