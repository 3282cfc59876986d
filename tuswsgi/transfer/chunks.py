"""The chunked transfer coding (RFC 9112, 7.1), taken apart as it arrives.

This file knows no sockets: it is given what came over the wire, in pieces of any size, and
returns what they carry. It is as strict as gunicorn's own parser, and does not mind whether a
megabyte comes as one chunk or as a million.
"""

from __future__ import annotations

import re

from tuswsgi.transfer.lines import Lines

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


class MalformedChunks(ValueError):
    """This is no chunked body; where it ends is unknown."""


class ChunkDecoder:
    """One chunked body.

    :ivar chunks: how many have begun.
    :ivar left: the bytes that the current chunk still lacks.
    :ivar trailers: the lines of the trailers, ``None`` until the body has ended.
    :ivar rest: what came after the end.
    :ivar error: why the body cannot be read on, ``None`` if it can.
    """

    def __init__(self) -> None:
        self.chunks = 0
        self.left = 0
        self.trailers: bytes | None = None
        self.rest = b""
        self.error: ValueError | None = None
        # What is not understood yet. Before each line with a size is the CR LF that ends the
        # chunk before it, also where there was none.
        self._kept = b"\r\n"
        self._lines: Lines | None = None

    def feed(self, wire: bytes) -> bytes:
        """Return the bytes that the next piece of the wire carries.

        A mistake does not cost what came before it: it is told by ``error``.
        """
        if self._lines is not None:
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
        """Append the bytes of chunks to `blocks`, and keep what is no whole line at the end."""
        add = blocks.append
        find = wire.find
        size_of = _sizes.get
        end = len(wire)
        at = 0
        # A chunk of one byte costs as much as one of thousands: this loop is all there is to it.
        while (stop := find(b"\r\n", at + 2)) >= 0:
            line = wire[at:stop]
            size = size_of(line)
            if size is None:
                size = _size(line)
            if size == 0:
                self._lines = Lines(LONGEST_TRAILERS)
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
        """Look for the end of the trailers; the CR LF before them has been given to us."""
        assert self._lines is not None
        try:
            end = self._lines.add(wire)
        except ValueError as error:
            self.error = error
            return
        if end >= 0:
            lines = self._lines.data
            self.trailers = bytes(lines[2:end])
            self.rest = bytes(lines[end + 4 :])


def _size(line: bytes) -> int:
    match = _SIZE_LINE.fullmatch(line)
    if match is None or len(line) > _LONGEST_LINE:
        raise MalformedChunks("The line with a chunk's size is malformed.")
    size = int(match[1], 16)
    if len(line) <= _SHORT:
        _sizes[line] = size
    return size
