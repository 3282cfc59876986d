"""Reads the body of a request on behalf of a data store.

The reader counts and limits the bytes, hashes them where a checksum was sent, can be
interrupted from outside and remembers why it ended. It asks a ``Body`` for bytes and
does not know what a WSGI server is; it fills file descriptors and does not know what
they mean.
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
from tuswsgi.lockers.base import SURE, Hold, IsLost
from tuswsgi.transfer.checksum import Checksum

#: The most bytes that are moved at once.
_STEP = 1024 * 1024

#: Seconds between two looks at all readers, at least.
_SHORTEST_PAUSE = 0.02


class Body(ABC):
    """The body of a request, as ``web`` gets it from the WSGI server.

    :ivar length: its announced length in bytes; ``None`` where it is chunked.
    :ivar received: how many of its bytes were taken as an upload's.
    """

    length: int | None = 0
    received: int = 0

    @abstractmethod
    def receive(self, n: int) -> memoryview | bytes:
        """Wait for bytes and return 1 to `n` of them, nothing at the end.

        The bytes are valid until the next switch of greenlets. After ``wake`` it may
        return nothing although the body goes on.

        :raises TusError: ``BodyIncomplete`` or ``BodyMalformed``; nothing more can come.
        """

    def transfer(self, fd: int, offset: int, n: int, is_lost: IsLost | None = None) -> int | None:
        """Wait for bytes and move 1 to `n` of them to a file, past this process' memory.

        :param is_lost: asked after each wait; nothing is moved if the lock is lost.
        :returns: how many, 0 where ``receive`` would return nothing; ``None`` if it cannot
            be done, which is to be asked again for every call.
        :raises TusError: as ``receive``.
        :raises OSError: if the file takes no more; nothing more can come then.
        """
        return None

    def nudge(self) -> None:
        """Make a waiting ``transfer`` take what has arrived, however little. Waits on."""

    @abstractmethod
    def wake(self) -> None:
        """Make a waiting ``receive`` return soon. May be called from anywhere."""

    def trailer(self, name: str) -> str | None:
        """Return a trailer's value once the end was reached."""
        return None


class UploadReader:
    """A ``datastores.base.Source`` on a body.

    :param checksum: what the bytes must hash to, if the client said so beforehand.
    :param awaits_trailer: the checksum comes after the body.
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
        #: When what has arrived shall be taken, however little; on the monotonic clock.
        self.due_at = math.inf
        self._pace = math.inf
        self._body = body
        self._limit = 0
        self._too_many: TusError = BodyTooLarge()
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

    def limit(self, limit: int, too_many: TusError) -> None:
        """Take at most `limit` bytes; the byte after them is the error `too_many`."""
        self._limit = limit
        self._too_many = too_many
        # What came before this, waiting for a lock above all, was not the client's silence.
        self.last_progress = time.monotonic()

    def guard(self, hold: Hold) -> None:
        """Look before every byte whether the upload's lock is lost, and end the body if so.

        The process may have stood still for long, and another one may write by now.
        """
        self._is_lost = None if hold is SURE else hold.is_lost

    def interrupt(self, error: TusError) -> None:
        """End the body as if it had come to its end, for the reason `error`.

        This is a latch: it stays set, and what arrives later is not read. A body that has
        ended by itself is not touched. May be called from anywhere.
        """
        if not self._ended and self.error is None:
            self.error = UploadInterrupted() if type(error) is UploadLocked else error
            self._body.wake()

    def pace(self, at: float, interval: float) -> None:
        """Take what has arrived at a time, and again when no byte has come for an interval.

        :param at: on the monotonic clock.
        :param interval: in seconds.
        """
        self.due_at = at
        self._pace = interval

    def nudge(self) -> None:
        """Take what has arrived of a slow body."""
        self.due_at = time.monotonic() + self._pace
        self._body.nudge()

    def _receive(self, n: int) -> memoryview | bytes:
        if self._ended or self.error is not None or self._has_lost_lock():
            return b""
        # One byte beyond the limit is asked for, since only that tells whether a chunked
        # body that reached it goes on.
        left = self._limit - self.received
        try:
            block = self._body.receive(min(n, left) or 1)
        except TusError as error:
            self.error = self.error or error
            return b""
        if block and left == 0:
            self.error = self._too_many
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
        # A full disk takes the first bytes and refuses the next ones.
        written += os.pwrite(fd, block[written:], offset + written)
    return written


class ActiveReaders:
    """The readers of this process, to end those that went silent or shall stop.

    :param network_timeout: the longest silence of a body, in seconds.
    :param lifetime: after how many seconds without progress an upload is forgotten, ``None`` for
        never: the bytes of a slow body are told in time.
    :param pace: returns the shortest interval, in seconds, at which readers are paced now.
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
        """Watch over `reader` for the length of a ``with`` block.

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
        """Interrupt every reader, now and from now on. Safe in a signal handler."""
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
        # One look at all readers now and then is far cheaper than a timer per wait.
        looked = time.monotonic()
        while True:
            pause = self._pause_before_next(readers)
            time.sleep(pause)
            now = time.monotonic()
            # A process that was held up knows nothing of its clients until it looks again.
            held_up = now - looked - pause > self.network_timeout / 2
            looked = now
            for reader in tuple(readers):
                silence = now - reader.last_progress
                if silence > self.network_timeout and not held_up:
                    reader.interrupt(ReadTimeout())
                elif silence > self._pause or reader.due_at <= now:
                    reader.nudge()

    def _pause_before_next(self, readers: set[UploadReader]) -> float:
        pace = self._pace()
        if pace == math.inf:
            return self._pause
        # Who comes meanwhile is due after its interval at the earliest. That many are due one
        # after the other must not keep us busy.
        due_at = min((reader.due_at for reader in tuple(readers)), default=math.inf)
        soonest = max(_SHORTEST_PAUSE, pace / 20)
        return max(soonest, min(self._pause, pace, due_at - time.monotonic()))


class _Active(AbstractContextManager[None]):
    """A reader that is watched over. Not a generator: every slow connection keeps one."""

    __slots__ = ("_reader", "_readers")

    def __init__(self, readers: set[UploadReader], reader: UploadReader) -> None:
        self._readers = readers
        self._reader = reader

    def __enter__(self) -> None:
        self._readers.add(self._reader)

    def __exit__(self, *_: object) -> None:
        self._readers.discard(self._reader)
