"""When one connection has had its turn and others get theirs.

Greenlets share a thread, and a greenlet that finds its next bytes in the socket each time it
looks never lets go of it. This file owns how much a connection may do at a time. It counts what
was done rather than the time: a wait is no work, and a count is the same on every machine. Who
waited for bytes in between has let others run already, which the hub's loop can tell.
"""

from __future__ import annotations

from tuswsgi.core.process import is_cooperative, let_others_run

#: Bytes after which others get their turn: with so many at a time a HEAD beside some fast
#: uploads waits for milliseconds.
TURN = 512 * 1024

#: What it costs to take bytes from a socket and to store them, however few they are, compared
#: with moving a byte.
_RECEIVE = 4 * 1024

#: What a chunk costs, likewise.
_CHUNK = 256

#: What a request costs, likewise.
_REQUEST = TURN // 4


class Turns:
    """Counts what is done for one connection while nobody else runs."""

    __slots__ = ("_done", "_round")

    def __init__(self) -> None:
        self._done = 0
        self._round = 0.0

    def received(self, n: int, *, times: int = 1, chunks: int = 0) -> None:
        """Count `n` bytes from the wire.

        :param times: how often the socket was asked for them.
        :param chunks: how many chunks of a chunked body they were.
        """
        self._done += n + times * _RECEIVE + chunks * _CHUNK

    def began(self) -> None:
        """Count a request."""
        self._done += _REQUEST

    def give(self) -> None:
        """Let others run if it is their turn.

        Between two turns of others, this connection has at most two of its own.
        """
        if self._done < TURN:
            return
        self._done = 0
        if self._round == _round():
            let_others_run()
        self._round = _round()


def _round() -> float:
    """Return what is another number once the hub has looked at its sockets."""
    if not is_cooperative():
        return 0.0
    from gevent import get_hub

    # The loop looks at the clock each time that it goes round, and only then.
    now: float = get_hub().loop.now()
    return now
