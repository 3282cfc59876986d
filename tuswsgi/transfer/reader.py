"""Reads the body of a request for a data store.

The reader counts, limits and hashes the bytes, can be interrupted from outside and remembers why
it ended. It receives bytes from a ``Body`` and writes them to file descriptors; it knows neither
WSGI servers nor uploads.
"""

from __future__ import annotations

import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from tuswsgi.core.errors import (
    BodyTooLarge,
    ChecksumMismatch,
    InvalidChecksum,
    LockLost,
    ReadTimeout,
    ServerShutdown,
    TusError,
    UploadInterrupted,
    UploadLocked,
)
from tuswsgi.core.process import PerProcess, let_others_run
from tuswsgi.lockers.base import HELD, Hold, IsLost
from tuswsgi.transfer.checksum import Checksum

#: The most bytes that are moved at once.
_STEP = 1024 * 1024

#: The shortest interval at which readers are checked, in seconds.
_SHORTEST_PAUSE = 0.02


class Body(ABC):
    """The body of a request, as the reader sees it.

    :ivar length: its announced length in bytes, ``None`` if it is chunked.
    :ivar received: the number of its bytes that the upload has got.
    """

    length: int | None = 0
    received: int = 0

    @abstractmethod
    def receive(self, n: int) -> memoryview | bytes:
        """Wait for bytes and return 1 to `n` of them, nothing at the end.

        The bytes are valid until the next switch of greenlets. After ``wake`` it may return
        nothing although the body goes on.

        :raises BodyIncomplete: if the connection is broken or closed.
        :raises BodyMalformed: if the chunked coding is malformed.
        """

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None = None) -> int | None:
        """Wait for bytes and move 1 to `n` of them to a file inside the kernel.

        :param is_lost: called after each wait; nothing is moved if the lock is lost.
        :returns: how many, 0 where ``receive`` would return nothing; ``None`` if the next bytes
            have to be received.
        :raises TusError: as ``receive``.
        :raises OSError: if the file takes no more bytes. The body cannot be read on then.
        """
        return None

    def nudge(self) -> None:
        """Make a waiting ``transfer`` take what has arrived, however little, and go on."""

    @abstractmethod
    def wake(self) -> None:
        """Make a waiting ``receive`` return soon. May be called from anywhere."""

    def trailer(self, name: str) -> str | None:
        """Return a trailer's value; only after the end of the body."""
        return None


class UploadReader:
    """A ``datastores.base.Source`` that reads a body.

    :param checksum: that of the bytes, if the client sent it in a header.
    :param awaits_trailer: whether the checksum comes in a trailer.
    :param on_progress: called after bytes were stored; a ``TusError`` ends the body.
    """

    def __init__(
        self,
        body: Body,
        *,
        checksum: Checksum | None = None,
        awaits_trailer: bool = False,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        self.received = 0
        #: Why the body ended, ``None`` if it came to its own end.
        self.error: TusError | None = None
        self.last_progress = time.monotonic()
        #: When to take what has arrived, however little; on the monotonic clock.
        self.due_at = math.inf
        self._pace = math.inf
        self._body = body
        self._limit = 0
        self._too_many: TusError | type[TusError] = BodyTooLarge
        self._checksum = checksum
        self._awaits_trailer = awaits_trailer
        self._hash = checksum.hash() if checksum else None
        self.on_progress = on_progress
        self._is_lost: IsLost | None = None
        self._ended = False

    @property
    def length(self) -> int | None:
        """The announced length of the body in bytes; ``None`` if it is chunked."""
        return self._body.length

    @property
    def is_empty(self) -> bool:
        """Whether there is no body; a chunked one may turn out to be empty, too."""
        return self._body.length == 0

    @property
    def provisional(self) -> bool:
        return self._checksum is not None or self._awaits_trailer

    def read(self, n: int) -> bytes:
        self._progressed()
        return bytes(self._receive(n))

    def copy_to(self, fd: int, offset: int) -> int:
        start = offset
        while kept := self._transfer(fd, offset):
            offset += kept
            self._progressed()
        return offset - start

    def accepted(self, stored: Callable[[], Iterable[bytes]]) -> bool:
        if self.error is not None or not self._ended:
            return False
        try:
            matches = self._matches(stored)
        except TusError as error:
            self.error = error
            return False
        if not matches:
            self.error = ChecksumMismatch()
        return matches

    def limit(self, limit: int, too_many: TusError | type[TusError]) -> None:
        """Accept at most `limit` bytes; one more is the error `too_many`."""
        self._limit = limit
        self._too_many = too_many
        # The time until now, e.g. for a lock, was not the client's silence.
        self.last_progress = time.monotonic()

    def guard(self, hold: Hold) -> None:
        """End the body if the upload's lock is lost, which is checked before every write.

        The process may have been suspended, and another one may be writing.
        """
        self._is_lost = None if hold is HELD else hold.is_lost

    def interrupt(self, error: TusError) -> None:
        """End the body for the reason `error`, unless it has ended already.

        Bytes that arrive later are not read. May be called from anywhere.
        """
        if not self._ended and self.error is None:
            self.error = UploadInterrupted() if type(error) is UploadLocked else error
            self._body.wake()

    def pace(self, at: float, interval: float) -> None:
        """Have the reader nudged.

        :param at: for the first time, on the monotonic clock.
        :param interval: and again after so many seconds without a byte.
        """
        self.due_at = at
        self._pace = interval

    def nudge(self) -> None:
        """Take what has arrived of a slow body, however little."""
        self.due_at = time.monotonic() + self._pace
        self._body.nudge()

    def _receive(self, n: int) -> memoryview | bytes:
        if self._ended or self.error is not None or self._has_lost_lock():
            return b""
        # At the limit one more byte is asked for: only that shows whether a chunked body goes on.
        left = self._limit - self.received
        try:
            block = self._body.receive(min(n, left) or 1)
        except TusError as error:
            self.error = self.error or error
            return b""
        if block and left == 0:
            too_many = self._too_many
            self.error = too_many() if isinstance(too_many, type) else too_many
            return b""
        if self._has_lost_lock():
            return b""
        self._count(len(block))
        if self._hash is not None:
            self._hash.update(block)
        return block

    def _transfer(self, fd: int, offset: int) -> int:
        """Move the next bytes to a file and return how many; 0 at the end."""
        left = self._limit - self.received
        ended = self._ended or self.error is not None or self._has_lost_lock()
        if self._hash is not None or left == 0 or ended:
            return self._write(fd, offset)
        try:
            moved = self._body.transfer(fd, offset, min(_STEP, left), self._is_lost)
        except TusError as error:
            self.error = self.error or error
            return 0
        if moved is None:
            return self._write(fd, offset)
        self._count(moved)
        return moved

    def _write(self, fd: int, offset: int) -> int:
        block = self._receive(_STEP)
        return write_at(fd, block, offset) if block else 0

    def _has_lost_lock(self) -> bool:
        if self._is_lost is None or not self._is_lost():
            return False
        self.error = self.error or LockLost()
        return True

    def _count(self, n: int) -> None:
        if n == 0:
            self._ended = not self._has_lost_lock() and self.error is None
            return
        self.received = self._body.received = self.received + n
        self.last_progress = time.monotonic()

    def _progressed(self) -> None:
        if self.on_progress is None or self.error is not None:
            return
        try:
            self.on_progress()
        except TusError as error:
            self.error = error

    def _matches(self, stored: Callable[[], Iterable[bytes]]) -> bool:
        if self._checksum is not None and self._hash is not None:
            return self._checksum.matches(self._hash)
        text = self._body.trailer("Upload-Checksum")
        if text is None:
            raise InvalidChecksum("The announced Upload-Checksum trailer is missing.")
        checksum = Checksum.parse(text)
        hash = checksum.hash()
        for block in stored():
            hash.update(block)
            let_others_run()
        return checksum.matches(hash)


def write_at(fd: int, block: memoryview | bytes, offset: int) -> int:
    """Write the whole of `block` at `offset` and return its length."""
    written = os.pwrite(fd, block, offset)
    while written < len(block):
        # A disk may become full within a block.
        written += os.pwrite(fd, block[written:], offset + written)
    return written


class ActiveReaders:
    """The readers of this process, which end at a timeout and at a stop.

    :param network_timeout: the longest silence of a body, in seconds.
    :param lifetime: the seconds without progress after which an upload expires, ``None`` for
        never. Bytes of a slow body are stored well before.
    :param pace: returns the shortest interval of ``UploadReader.pace`` now, in seconds.
    """

    def __init__(
        self,
        network_timeout: float,
        lifetime: float | None = None,
        pace: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.network_timeout = network_timeout
        self._pace = pace
        self._pause = max(0.05, min(network_timeout / 10, 2.0, (lifetime or math.inf) / 8))
        self._readers: PerProcess[set[UploadReader]] = PerProcess(self._start)
        self._stopped = False

    def active(self, reader: UploadReader) -> AbstractContextManager[None]:
        """Return a context in which `reader` is watched.

        :raises ServerShutdown: if ``stop`` was called before.
        """
        if self._stopped:
            raise ServerShutdown
        return _Active(self._readers.get(), reader)

    @property
    def is_stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped

    def stop(self) -> None:
        """Interrupt every reader, now and from now on. It is safe in a signal handler."""
        self._stopped = True
        for reader in tuple(self._readers.peek() or ()):
            reader.interrupt(ServerShutdown())

    def _start(self) -> set[UploadReader]:
        readers: set[UploadReader] = set()
        threading.Thread(
            target=self._watch, args=(readers,), name="tuswsgi-timeouts", daemon=True
        ).start()
        return readers

    def _watch(self, readers: set[UploadReader]) -> None:
        # Looking at all readers at intervals is far cheaper than a timer per wait.
        looked = time.monotonic()
        while True:
            pause = self._pause_before_next(readers)
            time.sleep(pause)
            now = time.monotonic()
            # After a suspension of the process the silence may not be the client's.
            was_suspended = now - looked - pause > self.network_timeout / 2
            looked = now
            for reader in tuple(readers):
                silence = now - reader.last_progress
                if silence > self.network_timeout and not was_suspended:
                    reader.interrupt(ReadTimeout())
                elif silence > self._pause or reader.due_at <= now:
                    reader.nudge()

    def _pause_before_next(self, readers: set[UploadReader]) -> float:
        pace = self._pace()
        if pace == math.inf:
            return self._pause
        # A reader that comes meanwhile is due after its interval at the earliest. Many that are due
        # one after the other must not cause a check each.
        due_at = min((reader.due_at for reader in tuple(readers)), default=math.inf)
        soonest = max(_SHORTEST_PAUSE, pace / 20)
        return max(soonest, min(self._pause, pace, due_at - time.monotonic()))


class _Active(AbstractContextManager[None]):
    """The context of a reader. Generators need more memory, and slow connections keep theirs."""

    __slots__ = ("_reader", "_readers")

    def __init__(self, readers: set[UploadReader], reader: UploadReader) -> None:
        self._readers = readers
        self._reader = reader

    def __enter__(self) -> None:
        self._readers.add(self._reader)

    def __exit__(self, *_: object) -> None:
        self._readers.discard(self._reader)
