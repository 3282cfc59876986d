"""A client that only knows how to resume, and does so until its upload is complete."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from e2e.client import BYTES, PATIENCE, Client, Response, chunk, path_of, sha1, wait_until

#: After these a client comes back.
PASSING = {409, 423, 460, 503}


@dataclass
class Uploader:
    """One upload, sent in pieces of any size and form.

    :param any_client: returns a client for the next request, maybe of another server.
    :param largest: the size of the largest piece.
    """

    any_client: Callable[[], Client]
    data: bytes
    random: random.Random
    path: str = ""
    largest: int = 400_000
    acknowledged: int = 0
    statuses: Counter[object] = field(default_factory=Counter)

    def run(self) -> None:
        while not self.path:
            self._try(self._create)
        while self.acknowledged < len(self.data):
            self._try(self._patch)
            self._try(self._head)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            self.statuses[type(error).__name__] += 1
            time.sleep(0.02)  # there may be no server right now

    def _create(self) -> None:
        headers = {**BYTES, "Upload-Length": len(self.data)}
        part = self.data[: self.random.choice([0, 1000, 300_000])]
        answer = self.any_client().request("POST", "/files/", headers, part)
        self.statuses[answer.status] += 1
        if answer.status == 201:
            self.path = path_of(answer)
            self._check(answer)

    def _head(self) -> None:
        answer = self.any_client().head(self.path)
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self._check(answer)
        else:
            assert answer.status in PASSING

    def _check(self, answer: Response) -> None:
        assert answer.offset >= self.acknowledged, "acknowledged bytes are lost"
        self.acknowledged = answer.offset

    def _patch(self) -> None:
        start = self.acknowledged
        part = self.data[start : start + self.random.randint(0, self.largest)]
        way = self.random.choice(["length", "chunked", "checksum", "wrong checksum", "abort"])
        chunked = way == "chunked" or (way == "abort" and self.random.random() < 0.5)
        headers = {}
        if way.endswith("checksum"):
            headers["Upload_Checksum"] = sha1(part if way == "checksum" else b"else")
        length = None if chunked else len(part)
        with self.any_client().start_patch(self.path, start, length, **headers) as connection:
            sent = part[: len(part) // 2] if way == "abort" else part
            if sent:
                connection.send(chunk(sent) if chunked else sent)
            if way == "abort":
                return
            if chunked:
                connection.send(chunk(b""))
            answer = connection.read()
        self.statuses[answer.status] += 1
        if answer.status == 204:
            assert way != "wrong checksum" or not part or sha1(part) == sha1(b"else")
            self._check(answer)
        else:
            assert answer.status in PASSING


def wait_for_progress(
    uploaders: Sequence[Uploader], uploading: Sequence[Future[None]], size: int
) -> None:
    """Wait until `size` more bytes were acknowledged, or until all is done."""
    before = sum(one.acknowledged for one in uploaders)
    wait_until(
        lambda: (
            sum(one.acknowledged for one in uploaders) > before + size
            or all(one.done() for one in uploading)
        ),
        "progress",
        # A connection that a strike left hanging is given up after PATIENCE, and tried again.
        2 * PATIENCE,
    )


def report(uploaders: Sequence[Uploader], strikes: Counter[str]) -> None:
    """Print what happened, for whoever looks into a failure."""
    print(f"strikes: {dict(strikes)}")
    print(f"answers: {dict(sum((one.statuses for one in uploaders), Counter()))}")
