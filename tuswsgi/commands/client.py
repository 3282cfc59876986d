"""A small client for ``tuswsgi upload``.

It uploads a file with tuspy, remembers the upload's URL until it is complete, and retries
after temporary errors.
"""

from __future__ import annotations

import fcntl
import json
import mimetypes
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import responses
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import SplitResult, urlsplit

import requests
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError
from tusclient.request import TusRequest, catch_requests_error
from tusclient.uploader.uploader import Uploader

from tuswsgi.core.backoff import Backoff
from tuswsgi.core.display import printable, without_secrets

#: Between attempts to reach the server; the command says how long each one is.
_BACKOFF = Backoff(first=0.5, longest=30.0, jitter=0)

#: Characters of an answer's body that are printed as the reason for an error.
_LONGEST_REASON = 500

#: The statuses below 500 after which tus clients retry.
_TEMPORARY = {409, 423, 429}

#: The statuses of uploads that do not exist (any more).
_FORGOTTEN = {404, 410}

_PORTS = {"http": 80, "https": 443}


class UploadFailed(Exception):
    """The file could not be uploaded."""


class FileChanged(UploadFailed):
    """The file was changed since the upload began."""


class _NoProgress(Exception):
    """The server accepted bytes, but its offset is the same as before."""


@dataclass
class Remembered:
    """The URLs of unfinished uploads, in a JSON file that only its owner can read.

    Several processes may use it at once. An invalid file counts as empty.
    """

    file: Path

    def get(self, key: str) -> str | None:
        """Return the URL for `key`."""
        return self._read().get(key)

    def set(self, key: str, url: str | None) -> None:
        """Remember the URL for `key`; ``None`` forgets it.

        :raises OSError: if the file cannot be written.
        """
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked():
            urls = self._read()
            urls.pop(key, None)
            if url is not None:
                urls[key] = url
            self._replace(json.dumps(urls, indent=2))

    def _read(self) -> dict[str, str]:
        try:
            urls = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(urls, dict):
            return {}
        return {key: url for key, url in urls.items() if isinstance(url, str)}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own, since the other one is replaced. It is never removed: two processes
        # could then lock different files.
        fd = os.open(self._beside("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _replace(self, text: str) -> None:
        new = self._beside("new")
        new.unlink(missing_ok=True)  # left by a process that was killed
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(self.file)

    def _beside(self, suffix: str) -> Path:
        return self.file.with_name(f"{self.file.name}.{suffix}")


class Source:
    """A file as it was when it was opened, as a stream of constant length for tuspy.

    :ivar length: in bytes.
    :raises UploadFailed: if it is not a regular file.
    """

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UploadFailed(f"{_shown(file)} is not a regular file.")
        self._version = _version(status)
        self.length = status.st_size
        self.modified_ns = status.st_mtime_ns

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(self.length if whence == os.SEEK_END else offset)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, n: int) -> bytes:
        """Return exactly `n` bytes.

        :raises FileChanged: if the file was changed.
        """
        block = self._stream.read(n)
        # Checked after reading, so that these bytes are from before any change.
        if len(block) != n or not self._is_unchanged():
            raise FileChanged(
                f"{_shown(self._file)} was changed during the upload. Upload it again, or a copy "
                "of it if it keeps changing."
            )
        return block

    def _is_unchanged(self) -> bool:
        try:
            return _version(self._file.stat()) == self._version
        except FileNotFoundError:
            return False


class _Uploader(Uploader):
    """tuspy's uploader, with checks of the server's answers.

    :param length: the length of the file.
    :param headers: sent only to the server where uploads are created, since they may be secret.
    """

    def __init__(self, length: int, headers: Mapping[str, str], **options: Any) -> None:
        self._length = length
        self._headers = headers
        super().__init__(**options)

    def get_headers(self) -> dict[str, str]:
        headers = dict(self.DEFAULT_HEADERS)
        server = urlsplit(cast(TusClient, self.client).url)
        if not self.url or _origin(urlsplit(self.url)) == _origin(server):
            headers.update(self._headers)
        return headers

    @catch_requests_error  # type: ignore[untyped-decorator]
    def get_offset(self) -> int:
        """Return the server's offset, and check its Upload-Length."""
        answer = requests.head(str(self.url), headers=self.get_headers())
        _check(answer.status_code, answer.content)
        length = answer.headers.get("Upload-Length")
        if length is not None and length != str(self._length):
            raise UploadFailed(
                f"The upload on the server has {printable(length)} bytes, the file {self._length}."
            )
        return self._offset(answer.headers.get("Upload-Offset"))

    def send(self) -> None:
        """Send the next chunk."""
        before = self.offset
        request = TusRequest(self)  # type: ignore[no-untyped-call]
        request.perform()  # type: ignore[no-untyped-call]
        _check(request.status_code or 0, request.response_content or b"")
        self.offset = self._offset(request.response_headers.get("upload-offset"))
        if self.offset <= before:
            raise _NoProgress

    def _offset(self, text: str | None) -> int:
        offset = int(text) if text and text.isascii() and text.isdigit() else None
        if offset is None or offset > self._length:
            shown = "no" if text is None else "a wrong"
            raise UploadFailed(f"The server's answer has {shown} Upload-Offset.")
        return offset


@dataclass
class Upload:
    """The upload of one file.

    :param url: where uploads are created. Its credentials are sent to this server only, and are
        neither remembered nor returned.
    :param chunk_size: how many bytes one request carries; they are held in memory.
    :param headers: sent with each request to the server of `url`, and to no other server.
    :param retries: how many attempts in a row may fail without progress.
    :param progress: called with the server's offset and the length of the file, in bytes.
    :param say: called with a message when an attempt failed and another one will follow.
    """

    file: Path
    url: str
    remembered: Remembered
    chunk_size: int
    retries: int
    progress: Callable[[int, int], None]
    say: Callable[[str], None]
    headers: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> str:
        """Upload the file, or the rest of it, and return the URL of the upload.

        :raises UploadFailed: if the server refuses it or cannot be reached, or if the file was
            changed.
        :raises OSError: if the file cannot be read.
        """
        with self.file.open("rb") as stream:
            self._source = source = Source(self.file, stream)
            self._key = (
                f"{self.file.absolute()} {source.length} {source.modified_ns} "
                f"{without_secrets(self.url)}"
            )
            return self._run()

    def _run(self) -> str:
        self._offset = most = failures = 0
        while True:
            try:
                return self._attempt()
            except FileChanged:
                self._remember(None)
                raise
            except (TusCommunicationError, _NoProgress) as error:
                failures = 1 if self._offset > most else failures + 1
                most = max(most, self._offset)
                if not _is_temporary(error) or failures > self.retries:
                    raise UploadFailed(_reason(error)) from error
                pause = _BACKOFF.after(failures)
                self.say(f"{_reason(error)} Trying again in {pause:g} s.")
                time.sleep(pause)

    def _attempt(self) -> str:
        uploader = self._uploader()
        self._advance(uploader.offset)
        while uploader.offset < self._source.length:
            uploader.send()
            self._advance(uploader.offset)
        self._remember(None)
        return _without_credentials(str(uploader.url))

    def _uploader(self) -> _Uploader:
        url = self.remembered.get(self._key)
        return (self._resumed(url) if url else None) or self._created()

    def _resumed(self, url: str) -> _Uploader | None:
        """Return an uploader for a remembered URL, ``None`` if the upload does not exist."""
        try:
            return self._make(url=self._with_credentials(url))
        except (UploadFailed, ValueError):
            return None
        except TusCommunicationError as error:
            if error.status_code in _FORGOTTEN or (
                error.status_code is None and not _is_temporary(error)
            ):
                return None
            raise

    def _created(self) -> _Uploader:
        uploader = self._make()
        try:
            uploader.set_url(self._with_credentials(uploader.create_url()))
        except ValueError as error:
            raise UploadFailed("The server's answer has a wrong Location.") from error
        self._remember(_without_credentials(str(uploader.url)))
        if self._source.length == 0:
            # There is no chunk whose answer would confirm the offset.
            uploader.offset = uploader.get_offset()
        return uploader

    def _make(self, **options: Any) -> _Uploader:
        filetype = mimetypes.guess_type(self.file.name)[0] or "application/octet-stream"
        return _Uploader(
            self._source.length,
            client=TusClient(self.url),
            headers=self.headers,
            file_stream=cast(BinaryIO, self._source),
            chunk_size=self.chunk_size,
            metadata={"filename": self.file.name, "filetype": filetype},
            **options,
        )

    def _with_credentials(self, url: str) -> str:
        """Return an upload's URL with the credentials of ``url``, if it is on the same server."""
        own = urlsplit(self.url)
        other = urlsplit(url)
        if "@" not in own.netloc or "@" in other.netloc or _origin(own) != _origin(other):
            return url
        credentials = own.netloc.rpartition("@")[0]
        return other._replace(netloc=f"{credentials}@{other.netloc}").geturl()

    def _remember(self, url: str | None) -> None:
        try:
            self.remembered.set(self._key, url)
        except OSError as error:
            # The upload can go on; it just cannot be resumed by another process.
            file = _shown(self.remembered.file)
            self.say(f"Unfinished uploads cannot be remembered in {file}: {error.strerror}.")

    def _advance(self, offset: int) -> None:
        self._offset = offset
        self.progress(offset, self._source.length)


def _check(status: int, content: bytes) -> None:
    if not 200 <= status < 300:
        raise TusCommunicationError("", status, content)  # type: ignore[no-untyped-call]


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Return a value that changes when the file is changed or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or _PORTS.get(url.scheme)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _shown(file: Path) -> str:
    return printable(str(file))


def _is_temporary(error: TusCommunicationError | _NoProgress) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, _NoProgress):
        return True
    if error.status_code is None:
        return isinstance(
            error.__context__,
            (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,
            ),
        )
    return error.status_code in _TEMPORARY or error.status_code >= 500


def _reason(error: TusCommunicationError | _NoProgress) -> str:
    if isinstance(error, _NoProgress):
        return "The server accepted bytes, but its offset is the same as before."
    if error.status_code is None:
        return f"The server cannot be reached: {_root(error)}."
    text = (error.response_content or b"").decode("utf-8", "replace").strip()
    if not text or text.startswith("<") or len(text) > _LONGEST_REASON:
        # A proxy's page of HTML says no more than its status does.
        return f"The server answered {error.status_code} ({_phrase(error.status_code)})."
    return f"The server answered {error.status_code}: {printable(text)}"


def _phrase(status: int) -> str:
    return responses.get(status, "no reason given")


def _root(error: BaseException) -> str:
    """Return the message of the innermost exception."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        text = getattr(cause, "strerror", None) or text
        cause = cause.__cause__ or cause.__context__
    return text
