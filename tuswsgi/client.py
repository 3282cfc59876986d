"""A small client, so that a server can be tried without another tool.

It uploads one file with tuspy, remembers the upload's URL until it is complete, and comes
back after errors that pass by themselves. It owns no protocol and no output: tuspy speaks
tus, and the command line shows the progress.
"""

from __future__ import annotations

import json
import mimetypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import requests
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError
from tusclient.uploader.uploader import Uploader

from tuswsgi.display import printable

_LONGEST_PAUSE = 30.0

#: The statuses below 500 after which clients of the tus family come back.
_PASSING = {409, 423, 429}

#: How a server says that it does not know an upload (any more).
_FORGOTTEN = {404, 410}


class UploadFailed(Exception):
    """The file could not be uploaded; the text says why."""


@dataclass
class Remembered:
    """The URLs of unfinished uploads, in a JSON file."""

    file: Path

    def get(self, key: str) -> str | None:
        """Return the URL that was remembered under `key`."""
        return self._read().get(key)

    def set(self, key: str, url: str | None) -> None:
        """Remember a URL; ``None`` forgets it."""
        urls = self._read()
        urls.pop(key, None)
        if url is not None:
            urls[key] = url
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(urls, indent=2), "utf-8")
        temporary.replace(self.file)

    def _read(self) -> dict[str, str]:
        try:
            urls = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return urls if isinstance(urls, dict) else {}


@dataclass
class Upload:
    """One file on its way to one server.

    :param url: where uploads are created.
    :param chunk_size: how many bytes one request carries; they are held in memory.
    :param retries: how many attempts in a row may fail without a byte's progress.
    :param progress: called with the number of bytes that the server has.
    :param say: called with a sentence when an attempt failed and another will follow.
    """

    file: Path
    url: str
    remembered: Remembered
    chunk_size: int
    retries: int
    progress: Callable[[int], None]
    say: Callable[[str], None]

    def run(self) -> str:
        """Upload the file, or what is left of it, and return the URL of the upload.

        :raises UploadFailed: if the server refuses it or cannot be reached any more.
        :raises OSError: if a file cannot be read or written.
        """
        self._offset = failures = 0
        with self.file.open("rb") as stream:
            while True:
                before = self._offset
                try:
                    return self._attempt(stream)
                except TusCommunicationError as error:
                    failures = 1 if self._offset > before else failures + 1
                    if not _passes(error) or failures > self.retries:
                        raise UploadFailed(_reason(error)) from error
                    pause = min(0.25 * 2**failures, _LONGEST_PAUSE)
                    self.say(f"{_reason(error)} Trying again in {pause:g} s.")
                    time.sleep(pause)

    def _attempt(self, stream: BinaryIO) -> str:
        status = os.fstat(stream.fileno())
        key = f"{self.file.absolute()} {status.st_size} {status.st_mtime_ns} {self.url}"
        uploader = self._uploader(stream, key)
        self._advance(uploader.offset)
        while uploader.offset < status.st_size:
            uploader.upload_chunk()  # type: ignore[no-untyped-call]
            self._advance(uploader.offset)
        self.remembered.set(key, None)
        return str(uploader.url)

    def _uploader(self, stream: BinaryIO, key: str) -> Uploader:
        filetype = mimetypes.guess_type(self.file.name)[0] or "application/octet-stream"
        make = partial(
            TusClient(self.url).uploader,
            file_stream=stream,
            chunk_size=self.chunk_size,
            metadata={"filename": self.file.name, "filetype": filetype},
        )
        url = self.remembered.get(key)
        if url is not None:
            try:
                return make(url=url)
            except TusCommunicationError as error:
                if error.status_code not in _FORGOTTEN:
                    raise
        uploader = make()
        uploader.set_url(uploader.create_url())
        self.remembered.set(key, uploader.url)
        return uploader

    def _advance(self, offset: int) -> None:
        self._offset = offset
        self.progress(offset)


def _passes(error: TusCommunicationError) -> bool:
    """Whether a later attempt may succeed."""
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


def _reason(error: TusCommunicationError) -> str:
    if error.status_code is None:
        return f"The server cannot be reached: {_root(error)}."
    text = (error.response_content or b"").decode("utf-8", "replace").strip()
    return f"The server answered {error.status_code}: {printable(text) or 'no reason given.'}"


def _root(error: BaseException) -> str:
    """Return what the system said, without the layers that wrapped it."""
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        text = getattr(cause, "strerror", None) or text
        cause = cause.__cause__ or cause.__context__
    return text
