"""Fairness between connections that share a thread.

Greenlets switch where they wait, and a greenlet whose next bytes are always there already never
waits. So each connection has a budget of work, after which it lets others run. The budget counts
work and not time: waiting is no work, and a count is the same on every machine.
"""

from __future__ import annotations

from tuswsgi.core.process import is_cooperative, let_others_run

#: The work of one turn, in bytes moved. Then a HEAD beside some fast uploads waits only
#: milliseconds.
TURN = 512 * 1024

#: The fixed cost of receiving and storing one block, besides its bytes.
RECEIVE = 4 * 1024

#: The work of decoding a chunk.
CHUNK = 256

#: The work of a request.
REQUEST = TURN // 4


class Budget:
    """The work that one connection may do before others run."""

    __slots__ = ("_iteration", "_spent")

    def __init__(self) -> None:
        self._spent = 0
        self._iteration = 0.0

    def spend(self, work: int) -> None:
        self._spent += work

    def share(self) -> None:
        """Let others run if the budget is spent.

        A connection that has waited since the last call has already let others run. So between
        two turns of the others it gets at most two turns.
        """
        if self._spent < TURN:
            return
        self._spent = 0
        if self._iteration == _iteration():
            let_others_run()
        self._iteration = _iteration()


def _iteration() -> float:
    """Return a number that differs between iterations of the event loop."""
    if not is_cooperative():
        return 0.0
    from gevent import get_hub

    # The loop reads the clock once in each iteration.
    now: float = get_hub().loop.now()
    return now
