"""How long to wait between attempts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

#: Unlike the generator of ``random``, applications and tests cannot seed it.
_random = random.SystemRandom()


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with jitter: each pause is twice as long as the one before.

    It only says how long to wait; the caller sleeps, or waits for an event with that timeout.
    It has no state, so one instance serves all loops and threads. ::

        for pause in Backoff(first=0.1, longest=5.0):
            try:
                return attempt()
            except Unavailable:
                time.sleep(pause)

    :param first: the pause after the first attempt, in seconds.
    :param longest: the longest pause, in seconds.
    :param jitter: the part of each pause that is random, from 0 to 1: with 0.5 a pause lasts
        between 50 and 100 % of its full length.
    """

    first: float
    longest: float
    jitter: float = 0.5

    def after(self, attempts: int) -> float:
        """Return the pause after so many failed attempts (at least 1), in seconds."""
        # Beyond 64 doublings every pause is the longest, and far beyond floats overflow.
        full = min(self.first * 2.0 ** min(attempts - 1, 64), self.longest)
        return jitter(full * (1 - self.jitter), full)

    def __iter__(self) -> Iterator[float]:
        """Yield the pauses after the first attempt, the second, and so on without end."""
        return map(self.after, count(1))


def jitter(low: float, high: float) -> float:
    """Return a random number in this range, so that processes do not act in step."""
    return _random.uniform(low, high)
