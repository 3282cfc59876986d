"""Gathers the lines of a head or of trailers until the empty line, however they arrive.

Each byte is looked at once, and there is an end to how many are kept. What the lines mean is
none of this file's business.
"""

from __future__ import annotations

import re

_BARE_LF = re.compile(rb"(?<!\r)\n")


class TooLong(ValueError):
    """There are more bytes than the limit before the empty line."""


class BareLF(ValueError):
    """A line ends without CR: its empty line would never be found.

    "A recipient MAY recognize a single LF as a line terminator" (RFC 9112, 2.2); gunicorn does
    not.
    """


class Lines:
    """The lines so far.

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
        # The last three bytes may be the beginning of what is looked for.
        start = max(0, len(self.data) - 3)
        self.data += more
        end = self.data.find(b"\r\n\r\n", start)
        stop = len(self.data) if end < 0 else end
        if _BARE_LF.search(self.data, start, stop) is not None:
            raise BareLF("A line ends without CR.")
        if stop > self._limit:
            raise TooLong(f"There are more than {self._limit} bytes without an empty line.")
        return end
