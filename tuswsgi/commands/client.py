"""A small client, so that a server can be tried without another tool.

It uploads one file with tuspy, remembers the upload's URL until it is complete, and comes
back after errors that pass by themselves. It owns no protocol and no output: tuspy speaks
tus, and the command line shows the progress.
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

#: The statuses below 500 after which clients of the tus family come back.
_PASSING = {409, 423, 429}

#: How a server says that it does not know an upload (any more).
_FORGOTTEN = {404, 410}

_PORTS = {"http": 80, "https": 443}


class UploadFailed(Exception):
    """The file could not be uploaded; the text says why."""


class FileChanged(UploadFailed):
    """The file is not the one any more that the upload was begun with."""


class _NoProgress(Exception):
    """The server took bytes and says that it has no more than before."""


@dataclass
class Remembered:
    """The URLs of unfinished uploads, in a JSON file that only its owner can read.

    Several processes may use it at once. A file that cannot be understood counts as empty.
    """

    file: Path

    def get(self, key: str) -> str | None:
        """Return the URL that was remembered under `key`."""
        return self._read().get(key)

    def set(self, key: str, url: str | None) -> None:
        """Remember a URL; ``None`` forgets it.

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
        # Not the file itself, in whose place another one is put. It stays: who removes a lock's
        # file lets two in.
        fd = os.open(self._beside("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _replace(self, text: str) -> None:
        new = self._beside("new")
        new.unlink(missing_ok=True)  # of a process that was killed
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(self.file)

    def _beside(self, suffix: str) -> Path:
        return self.file.with_name(f"{self.file.name}.{suffix}")


class Source:
    """A file as it was when it was opened; for tuspy a stream of always the same length.

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

        :raises FileChanged: if the file is not as it was.
        """
        block = self._stream.read(n)
        # Looked at after reading: what was read before a change is what it was.
        if len(block) != n or not self._is_unchanged():
            raise FileChanged(
                f"{_shown(self._file)} was changed while it was uploaded. Upload it again, "
                "or a copy of it if it goes on changing."
            )
        return block

    def _is_unchanged(self) -> bool:
        try:
            return _version(self._file.stat()) == self._version
        except FileNotFoundError:
            return False


class _Uploader(Uploader):
    """tuspy's uploader, but it looks closely at what the server says.

    :param length: the length of the file.
    :param headers: sent to the server of the client only: an upload may be on another one.
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
        """Ask the server, also whether it expects as many bytes as there are."""
        answer = requests.head(str(self.url), headers=self.get_headers())
        _check(answer.status_code, answer.content)
        length = answer.headers.get("Upload-Length")
        if length is not None and length != str(self._length):
            raise UploadFailed(
                f"The upload on the server is of {printable(length)} bytes, the file of "
                f"{self._length}."
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
    """One file on its way to one server.

    :param url: where uploads are created. Its credentials go to this server only, and no further:
        neither into `remembered` nor into what ``run`` returns.
    :param chunk_size: how many bytes one request carries; they are held in memory.
    :param headers: sent with each request to the server of `url`, and to no other one.
    :param retries: how many attempts in a row may fail without a byte's progress.
    :param progress: called with the number of bytes that the server has, and with the file's.
    :param say: called with a sentence when an attempt failed and another will follow.
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
        """Upload the file, or what is left of it, and return the URL of the upload.

        :raises UploadFailed: if the server refuses it or cannot be reached any more, or the file
            was changed meanwhile.
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
                if not _passes(error) or failures > self.retries:
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
        """Return where to go on, ``None`` if there is no such upload of this file."""
        try:
            return self._make(url=self._with_credentials(url))
        except (UploadFailed, ValueError):
            return None
        except TusCommunicationError as error:
            if error.status_code in _FORGOTTEN or (
                error.status_code is None and not _passes(error)
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
            # No chunk will tell whether the server has all of it.
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
        """Return an upload's URL with the credentials that were given for its server."""
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
            # Uploading is what it is here for.
            file = _shown(self.remembered.file)
            self.say(f"Unfinished uploads cannot be remembered in {file}: {error.strerror}.")

    def _advance(self, offset: int) -> None:
        self._offset = offset
        self.progress(offset, self._source.length)


def _check(status: int, content: bytes) -> None:
    if not 200 <= status < 300:
        raise TusCommunicationError("", status, content)  # type: ignore[no-untyped-call]


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Return what differs when a file was changed, or another one took its place."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or _PORTS.get(url.scheme)


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _shown(file: Path) -> str:
    return printable(str(file))


def _passes(error: TusCommunicationError | _NoProgress) -> bool:
    """Whether a later attempt may succeed."""
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
    return error.status_code in _PASSING or error.status_code >= 500


def _reason(error: TusCommunicationError | _NoProgress) -> str:
    if isinstance(error, _NoProgress):
        return "The server took bytes, but has no more of them than before."
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
    """Return what the system said, without the layers that wrapped it."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        text = getattr(cause, "strerror", None) or text
        cause = cause.__cause__ or cause.__context__
    return text
