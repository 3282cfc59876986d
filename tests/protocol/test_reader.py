"""The reader of bodies: limits, the interrupt latch, timeouts, checksums, and files."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from protocol.client import Client
from tuswsgi.core.errors import (
    BodyIncomplete,
    BodyTooLarge,
    ChecksumMismatch,
    InvalidChecksum,
    InvalidUploadOffset,
    ReadTimeout,
    ServerShutdown,
    TusError,
    UploadInterrupted,
    UploadLocked,
    UploadSizeExceeded,
)
from tuswsgi.core.events import RequestInfo
from tuswsgi.lockers.base import IsLost
from tuswsgi.transfer.checksum import Checksum
from tuswsgi.transfer.reader import ActiveReaders, Body, UploadReader

HELLO = b"hello world"
SHA1 = Checksum("sha1", hashlib.sha1(HELLO).digest())


class MemoryBody(Body):
    """A body that gives its blocks one by one, and then ends or breaks off.

    :param silent: whether it waits for ever after the last block, until it is woken.
    """

    def __init__(
        self,
        *blocks: bytes,
        chunked: bool = False,
        error: TusError | None = None,
        silent: bool = False,
        trailer: str | None = None,
    ) -> None:
        self.length = None if chunked else sum(map(len, blocks))
        self.asked: list[int] = []
        self._blocks = list(blocks)
        self._error = error
        self._silent = silent
        self._trailer = trailer
        self._woken = threading.Event()
        self.nudged = threading.Event()

    def receive(self, n: int) -> bytes:
        assert n > 0
        self.asked.append(n)
        if self._woken.is_set():
            return b""
        if self._blocks:
            block = self._blocks.pop(0)
            if len(block) > n:
                self._blocks.insert(0, block[n:])
            return block[:n]
        if self._silent:
            assert self._woken.wait(30), "nobody woke the body"
            return b""
        if self._error is not None:
            raise self._error
        return b""

    def wake(self) -> None:
        self._woken.set()

    def nudge(self) -> None:
        self.nudged.set()

    def trailer(self, name: str) -> str | None:
        return self._trailer if name == "Upload-Checksum" else None


class Splicing(MemoryBody):
    """A body that the kernel moves to the file, if it is asked nicely."""

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None = None) -> int | None:
        if len(self.asked) % 3 == 2:
            return None
        return os.pwrite(fd, self.receive(n), offset)


def reader_of(
    body: Body,
    limit: int = 100,
    checksum: Checksum | None = None,
    awaits_trailer: bool = False,
    on_progress: Callable[[], None] | None = None,
) -> UploadReader:
    reader = UploadReader(
        body, checksum=checksum, awaits_trailer=awaits_trailer, on_progress=on_progress
    )
    reader.limit(limit, UploadSizeExceeded())
    return reader


def drain(reader: UploadReader) -> bytes:
    return b"".join(iter(lambda: reader.read(4), b""))


def nothing() -> Iterable[bytes]:
    raise AssertionError("the bytes were hashed as they came")


Drain = Callable[[UploadReader], bytes]


@pytest.fixture(params=["read", "copy"])
def take(request: pytest.FixtureRequest, tmp_path: Path) -> Drain:
    """Take all bytes of a reader in one of its two ways."""
    if request.param == "read":
        return drain

    def copy(reader: UploadReader) -> bytes:
        with (tmp_path / "file").open("wb") as file:
            file.write(b"before")
            file.flush()
            copied = reader.copy_to(file.fileno(), 6)
        content = (tmp_path / "file").read_bytes()
        assert content.startswith(b"before")
        assert len(content) == 6 + copied
        return content[6:]

    return copy


@pytest.fixture(params=[MemoryBody, Splicing])
def body_type(request: pytest.FixtureRequest) -> type[MemoryBody]:
    kind: type[MemoryBody] = request.param
    return kind


class TestLimits:
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("limit", [11, 12, 2**63 - 1])
    def test_all_that_may_come(
        self, take: Drain, body_type: type[MemoryBody], chunked: bool, limit: int
    ) -> None:
        reader = reader_of(body_type(b"hello", b" ", b"world", chunked=chunked), limit)
        assert take(reader) == HELLO
        assert (reader.received, reader.error) == (11, None)
        assert take(reader) == b"", "the end stays the end"

    @pytest.mark.parametrize("limit", range(11))
    def test_one_byte_too_many(self, take: Drain, body_type: type[MemoryBody], limit: int) -> None:
        body = body_type(b"hello", b" ", b"world", chunked=True)
        reader = reader_of(body, limit)
        assert take(reader) == HELLO[:limit]
        assert isinstance(reader.error, UploadSizeExceeded)
        assert reader.received == limit
        asked = len(body.asked)
        assert take(reader) == b""
        assert len(body.asked) == asked, "nothing is read after an error"

    def test_without_a_limit_nothing_may_come(self, take: Drain) -> None:
        reader = UploadReader(MemoryBody(b"x", chunked=True))
        assert take(reader) == b""
        assert isinstance(reader.error, BodyTooLarge)

    def test_never_more_than_the_limit_is_asked_for(self) -> None:
        body = MemoryBody(b"x" * 10, chunked=True)
        reader = reader_of(body, 10)
        assert reader.read(1000) == b"x" * 10
        assert reader.read(1000) == b""
        assert body.asked == [10, 1]


class TestTheEnd:
    def test_a_body_that_breaks_off(self, take: Drain, body_type: type[MemoryBody]) -> None:
        reader = reader_of(body_type(b"hello", error=BodyIncomplete()))
        assert take(reader) == b"hello"
        assert isinstance(reader.error, BodyIncomplete)
        assert not reader.accepted(nothing)

    def test_progress_is_told(self, take: Drain) -> None:
        told: list[int] = []
        reader = reader_of(
            MemoryBody(b"hello", b" world"), on_progress=lambda: told.append(reader.received)
        )
        assert take(reader) == HELLO
        assert told[-1] == 11
        assert sorted(told) == told

    def test_progress_may_end_the_body(self, take: Drain) -> None:
        # After the bytes were stored: what has arrived is kept.
        def fail() -> None:
            if reader.received >= 5:
                raise ServerShutdown

        reader = reader_of(MemoryBody(b"hello", b"wor", b"ld"), on_progress=fail)
        kept = take(reader)
        assert kept.startswith(b"hell")
        assert isinstance(reader.error, ServerShutdown)
        assert take(reader) == b""


class TestInterrupt:
    def test_before_the_first_byte(self, take: Drain, body_type: type[MemoryBody]) -> None:
        body = body_type(b"hello")
        reader = reader_of(body)
        reader.interrupt(ServerShutdown())
        assert take(reader) == b""
        assert isinstance(reader.error, ServerShutdown)
        assert body.asked == []

    def test_in_the_middle(self, take: Drain) -> None:
        reader = reader_of(MemoryBody(b"hello", silent=True))
        kept: list[bytes] = []
        thread = threading.Thread(target=lambda: kept.append(take(reader)))
        thread.start()
        while reader.received < 5:
            time.sleep(0)
        reader.interrupt(UploadLocked())
        thread.join(30)
        assert kept == [b"hello"]
        assert type(reader.error) is UploadInterrupted

    def test_the_first_reason_stays(self) -> None:
        reader = reader_of(MemoryBody(b"hello"))
        reader.interrupt(UploadInterrupted())
        reader.interrupt(ServerShutdown())
        assert type(reader.error) is UploadInterrupted

    def test_after_the_end_it_is_too_late(self, take: Drain) -> None:
        reader = reader_of(MemoryBody(HELLO), checksum=SHA1)
        assert take(reader) == HELLO
        reader.interrupt(ServerShutdown())
        assert reader.error is None
        assert reader.accepted(nothing)

    def test_it_discards_what_is_provisional(self, take: Drain) -> None:
        reader = reader_of(MemoryBody(HELLO, silent=True), checksum=SHA1)
        assert reader.read(5) == b"hello"
        reader.interrupt(ServerShutdown())
        take(reader)
        assert not reader.accepted(nothing)
        assert isinstance(reader.error, ServerShutdown)


class TestChecksums:
    def test_plain_bytes_are_not_provisional(self) -> None:
        assert not reader_of(MemoryBody()).provisional

    def test_a_match(self, take: Drain, body_type: type[MemoryBody]) -> None:
        reader = reader_of(body_type(b"hello", b" world"), checksum=SHA1)
        assert reader.provisional
        assert take(reader) == HELLO
        assert reader.accepted(nothing)
        assert reader.error is None

    def test_a_mismatch(self, take: Drain) -> None:
        reader = reader_of(MemoryBody(b"hello", b" world!"), checksum=SHA1)
        take(reader)
        assert not reader.accepted(nothing)
        assert isinstance(reader.error, ChecksumMismatch)

    def test_too_many_bytes_never_match(self, take: Drain) -> None:
        reader = reader_of(MemoryBody(HELLO, b"!", chunked=True), 11, checksum=SHA1)
        take(reader)
        assert not reader.accepted(nothing)
        assert isinstance(reader.error, UploadSizeExceeded)

    def test_what_was_not_read_to_its_end_never_matches(self) -> None:
        reader = reader_of(MemoryBody(HELLO), checksum=SHA1)
        assert reader.read(11) == HELLO
        assert not reader.accepted(nothing)

    @pytest.mark.parametrize(
        ("trailer", "error"),
        [
            ("sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=", None),
            ("md5 Kq5sNclPz7QV2+lfQIuc6Q==", ChecksumMismatch),
            ("sha1 x", InvalidChecksum),
            ("", InvalidChecksum),
            (None, InvalidChecksum),
        ],
    )
    def test_a_trailer(
        self, take: Drain, trailer: str | None, error: type[TusError] | None
    ) -> None:
        reader = reader_of(MemoryBody(HELLO, chunked=True, trailer=trailer), awaits_trailer=True)
        assert reader.provisional
        kept = take(reader)
        assert reader.accepted(lambda: [kept[:3], kept[3:]]) is (error is None)
        assert type(reader.error) is (type(None) if error is None else error)


class TestFiles:
    def test_what_cannot_be_written_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file"):
            reader_of(MemoryBody(HELLO)).copy_to(file.fileno(), 0)

    def test_its_position_is_not_used(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file:
            file.write(b"0123456789")
            file.flush()
            assert reader_of(MemoryBody(b"ab")).copy_to(file.fileno(), 4) == 2
            assert file.tell() == 10
        assert (tmp_path / "file").read_bytes() == b"0123ab6789"


class TestActiveReaders:
    def test_silence_ends(self) -> None:
        readers = ActiveReaders(network_timeout=0.05)
        reader = reader_of(MemoryBody(b"hello", silent=True))
        with readers.active(reader):
            assert drain(reader) == b"hello"
        assert isinstance(reader.error, ReadTimeout)

    def test_slow_bodies_are_nudged(self) -> None:
        readers = ActiveReaders(network_timeout=0.3)
        body = MemoryBody(b"hello", silent=True)
        with readers.active(reader := reader_of(body)):
            assert drain(reader) == b"hello"
        assert body.nudged.is_set()

    @pytest.mark.parametrize("listens", [False, True])
    def test_only_listeners_to_progress_have_slow_bodies_nudged_in_time(
        self, client: Client, listens: bool
    ) -> None:
        if listens:
            client.tus.on("post-receive")(lambda request: None)
        id = client.create(len(HELLO)).rpartition("/")[2]
        reader = reader_of(MemoryBody(HELLO))
        client.tus.uploads.append(id, 0, None, reader, RequestInfo())
        assert (reader.due_at < math.inf) is listens

    def test_stopping_ends_those_that_are_and_those_that_come(self) -> None:
        readers = ActiveReaders(network_timeout=60)
        reader = reader_of(MemoryBody(b"hello", silent=True))
        with readers.active(reader):
            readers.stop()
            assert drain(reader) == b""
        assert isinstance(reader.error, ServerShutdown)
        with pytest.raises(ServerShutdown), readers.active(reader_of(MemoryBody())):
            pytest.fail("a reader after the stop")

    def test_who_is_done_is_left_alone(self) -> None:
        readers = ActiveReaders(network_timeout=60)
        with readers.active(reader := reader_of(MemoryBody(b"hello", silent=True))):
            pass
        readers.stop()
        assert reader.error is None

    def test_other_errors_of_a_body_are_no_silence(self) -> None:
        readers = ActiveReaders(network_timeout=60)
        reader = reader_of(MemoryBody(error=InvalidUploadOffset()))
        with readers.active(reader):
            assert drain(reader) == b""
        assert isinstance(reader.error, InvalidUploadOffset)
