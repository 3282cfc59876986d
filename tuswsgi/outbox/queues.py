"""The threads that send post-hooks: many at once, but one per upload and transport.

The threads are greenlets where gevent has patched this process. What a job does, and what
follows from its failure, is the business of ``sending``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Union

from tuswsgi.core.events import Event, HookType
from tuswsgi.hooks.base import Hook, HookRequest

log = logging.getLogger(__name__)

#: How many unrecorded hooks may wait in one process. Each holds an upload's record and its
#: request's headers: some kilobytes.
QUEUE_SIZE = 1000


@dataclass(frozen=True)
class OneShot:
    """An unrecorded post-hook: it is sent once, and lost if that fails."""

    hook: Hook
    request: HookRequest

    def __str__(self) -> str:
        return f"{self.request.type} of {self.request.info.id} by {self.hook.name}"

    @property
    def is_progress(self) -> bool:
        """Whether it reports progress, so that a newer report replaces it."""
        return self.request.type is HookType.POST_RECEIVE


Job = Union[Event, OneShot]  # noqa: UP007  # an alias is evaluated at run time


@dataclass(eq=False)
class _Queue:
    """The jobs of one upload and transport.

    :ivar slot: the kind of job whose slot it occupies; ``None`` while it waits for one.
    """

    upload: str
    transport: str
    todo: deque[Job] = field(default_factory=deque)
    has_events: bool = False
    slot: type[Job] | None = None


class Queues:
    """The queues of one process, each in a thread of its own while it has jobs.

    Each transport has its own slots for running queues, so that a slow transport does not block the
    others, nor one-shots the events.

    :param work: does a job, and may return the next event of the same queue.
    :param slots: how many queues of a transport run at once, for either kind of job.
    :param on_end: called with the transport when a queue has ended.
    """

    def __init__(
        self, work: Callable[[Job], Event | None], slots: int, on_end: Callable[[str], None]
    ) -> None:
        self._work = work
        self._slots = slots
        self._on_end = on_end
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._waiting: dict[str, dict[_Queue, None]] = {}
        self._used: Counter[tuple[str, type[Job]]] = Counter()
        self._queued = 0
        self._changed = threading.Condition()

    def free(self, transport: str, kind: type[Job] = Event) -> int:
        """Return how many more queues of a transport may run now."""
        return max(0, self._slots - self._used[transport, kind])

    def add_event(self, event: Event) -> None:
        """Begin to deliver an event. The caller has made sure that there is a free slot.

        Waiting progress of its upload is dropped: it would arrive out of order.

        :raises RuntimeError: if no more threads can be started.
        """
        with self._changed:
            queue = self._queue(event.upload, event.transport)
            self._drop_progress(queue)
            queue.todo.append(event)
            queue.has_events = True
            if queue.slot is None:
                self._waiting.get(queue.transport, {}).pop(queue, None)
                self._begin(queue, Event)

    def add_one_shot(self, shot: OneShot) -> bool:
        """Queue an unrecorded hook. Newer progress replaces older progress.

        :returns: whether it will be sent: not if too many wait, and no progress while events
            of its upload are delivered.
        """
        upload = shot.request.info.id
        transport = shot.hook.name
        with self._changed:
            queue = self._queues.get((upload, transport))
            if shot.is_progress and queue is not None:
                if queue.has_events:
                    return False
                self._drop_progress(queue)
            if self._queued >= QUEUE_SIZE:
                return False
            queue = queue or self._queue(upload, transport)
            queue.todo.append(shot)
            self._queued += 1
            if queue.slot is not None:
                return True
            if not self.free(transport, OneShot):
                self._waiting.setdefault(transport, {})[queue] = None
                return True
            try:
                self._begin(queue, OneShot)
            except RuntimeError:
                return False
        return True

    def join(self, timeout: float) -> bool:
        """Wait until all queues are empty.

        :param timeout: in seconds.
        :returns: whether they are.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._queues, timeout)

    def _queue(self, upload: str, transport: str) -> _Queue:
        return self._queues.setdefault((upload, transport), _Queue(upload, transport))

    def _drop_progress(self, queue: _Queue) -> None:
        kept = [job for job in queue.todo if not (isinstance(job, OneShot) and job.is_progress)]
        self._queued -= len(queue.todo) - len(kept)
        queue.todo = deque(kept)

    def _begin(self, queue: _Queue, kind: type[Job]) -> None:
        queue.slot = kind
        self._used[queue.transport, kind] += 1
        thread = threading.Thread(target=self._run, args=(queue,), name="tuswsgi-hook", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._queued -= sum(isinstance(job, OneShot) for job in queue.todo)
            self._end(queue, kind)
            raise

    def _end(self, queue: _Queue, kind: type[Job]) -> None:
        del self._queues[queue.upload, queue.transport]
        self._used[queue.transport, kind] -= 1
        self._changed.notify_all()

    def _run(self, queue: _Queue) -> None:
        while (job := self._next(queue)) is not None:
            try:
                following = self._work(job)
            except Exception:
                log.exception("Post-hooks of %s by %s failed", queue.upload, queue.transport)
                continue
            if following is not None:
                with self._changed:
                    queue.todo.appendleft(following)
        self._on_end(queue.transport)

    def _next(self, queue: _Queue) -> Job | None:
        with self._changed:
            if queue.todo:
                job = queue.todo.popleft()
                self._queued -= isinstance(job, OneShot)
                return job
            assert queue.slot is not None
            self._end(queue, queue.slot)
            if waiting := self._waiting.get(queue.transport):
                self._begin_waiting(waiting)
            return None

    def _begin_waiting(self, waiting: dict[_Queue, None]) -> None:
        first = next(iter(waiting))
        if self.free(first.transport, OneShot):
            del waiting[first]
            try:
                self._begin(first, OneShot)
            except RuntimeError:
                log.warning("A post-hook of %s is dropped: no thread can be started", first.upload)
