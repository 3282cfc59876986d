"""The framing of HTTP/1 messages (RFC 9112): sections of fields, and chunked bodies.

It decodes bytes as they arrive, in pieces of any size, and knows no sockets. It is as strict as
gunicorn's parser, and does not mind whether a megabyte comes as one chunk or as a million.
"""

from __future__ import annotations

import re

#: The most bytes of all trailers together.
LONGEST_TRAILERS = 128 * 1024

#: The longest line with a chunk's size and its extensions.
_LONGEST_LINE = 8190

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
_SIZE_LINE = re.compile(rb"\r\n([0-9A-Fa-f]+)(?:%b)*" % _EXTENSION)

#: The sizes of short lines, which come again and again, with the CR LF before the line.
_sizes: dict[bytes, int] = {}
_SHORT = 5


_BARE_LF = re.compile(rb"(?<!\r)\n")


class TooLong(ValueError):
    """A section of fields is longer than its limit."""


class BareLF(ValueError):
    """A line ends without CR.

    "A recipient MAY recognize a single LF as a line terminator" (RFC 9112, 2.2); gunicorn does
    not.
    """


class MalformedChunks(ValueError):
    """The body is not chunked correctly, so its end is unknown."""


class FieldBuffer:
    """Collects the lines of a head or of trailers until the empty line.

    Each byte is looked at once.

    :param limit: the most bytes before the empty line.
    """

    __slots__ = ("_limit", "data")

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self._limit = limit

    def add(self, more: bytes) -> int:
        """Add what arrived and return where the CR LF CR LF of the empty line begins, or -1.

        :raises TooLong: if that is beyond the limit.
        :raises BareLF: if a line before it ends with nothing but LF.
        """
        # The last three bytes may be the beginning of CR LF CR LF.
        start = max(0, len(self.data) - 3)
        self.data += more
        end = self.data.find(b"\r\n\r\n", start)
        stop = len(self.data) if end < 0 else end
        if _BARE_LF.search(self.data, start, stop) is not None:
            raise BareLF("A line ends without CR.")
        if stop > self._limit:
            raise TooLong(f"There are more than {self._limit} bytes without an empty line.")
        return end


class ChunkDecoder:
    """Decodes one chunked body (RFC 9112, 7.1) as it arrives.

    :ivar chunks: the number of chunks that have begun.
    :ivar left: the number of bytes that the current chunk still lacks.
    :ivar trailers: the lines of the trailers, ``None`` until the body has ended.
    :ivar rest: the bytes after the end.
    :ivar error: why the body cannot be decoded further, ``None`` if it can.
    """

    def __init__(self) -> None:
        self.chunks = 0
        self.left = 0
        self.trailers: bytes | None = None
        self.rest = b""
        self.error: ValueError | None = None
        # What is not decoded yet. A line with a size is looked at with the CR LF before it, which
        # ends the last chunk; the first line gets one, too.
        self._kept = b"\r\n"
        self._trailers: FieldBuffer | None = None

    def feed(self, wire: bytes) -> bytes:
        """Return the content of the next encoded bytes, in pieces of any size.

        What precedes a malformed chunk is returned; ``error`` is set then.
        """
        if self._trailers is not None:
            self._end(wire)
            return b""
        if self.left > len(wire):
            self.left -= len(wire)
            return wire
        blocks = [wire[: self.left]]
        wire = self._kept + wire[self.left :]
        self.left = 0
        self._kept = b""
        try:
            self._split(wire, blocks)
        except MalformedChunks as error:
            self.error = error
        self.chunks += len(blocks) - 1
        return b"".join(blocks)

    def _split(self, wire: bytes, blocks: list[bytes]) -> None:
        """Append the content of chunks to `blocks`, and keep an incomplete line."""
        add = blocks.append
        find = wire.find
        size_of = _sizes.get
        end = len(wire)
        at = 0
        # A chunk costs the same for one byte as for thousands, so this loop must be short.
        while (stop := find(b"\r\n", at + 2)) >= 0:
            line = wire[at:stop]
            size = size_of(line)
            if size is None:
                size = _size(line)
            if size == 0:
                self._trailers = FieldBuffer(LONGEST_TRAILERS)
                self._end(wire[stop:])
                break
            at = stop + 2 + size
            add(wire[stop + 2 : at])
            if at > end:
                self.left = at - end
                at = end
                break
        else:
            self._keep(wire[at:])

    def _keep(self, start: bytes) -> None:
        if start[:2] != b"\r\n"[: len(start)] or b"\n" in start[2:]:
            raise MalformedChunks("A chunk does not end where it should.")
        if len(start) > _LONGEST_LINE:
            raise MalformedChunks("The line with a chunk's size is too long.")
        self._kept = start

    def _end(self, wire: bytes) -> None:
        """Look for the end of the trailers. What is added first begins with CR LF."""
        assert self._trailers is not None
        try:
            end = self._trailers.add(wire)
        except ValueError as error:
            self.error = error
            return
        if end >= 0:
            data = self._trailers.data
            self.trailers = bytes(data[2:end])
            self.rest = bytes(data[end + 4 :])


def _size(line: bytes) -> int:
    match = _SIZE_LINE.fullmatch(line)
    if match is None or len(line) > _LONGEST_LINE:
        raise MalformedChunks("The line with a chunk's size is malformed.")
    size = int(match[1], 16)
    if len(line) <= _SHORT:
        _sizes[line] = size
    return size
