"""One connection to an AMQP broker: its channels, confirmations and declarations.

This file owns what happens between the opening of a connection and its end, and it alone
calls pika. Which connections there are, and for how long somebody waits, is decided by the
pool in ``connections.amqp``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pika
from pika.adapters.select_connection import IOLoop
from pika.channel import Channel
from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker

log = logging.getLogger(__name__)

#: Seconds for a polite end of a connection.
FAREWELL = 1.0

#: Declares one thing and calls back, as pika's ``callback`` arguments have it.
Declaration = Callable[[Channel, Callable[[Any], None]], object]


class PublishFailed(Exception):
    """The broker did not confirm a message."""


class BrokerAway(PublishFailed):
    """There is no connection to the broker."""


class ConnectionLost(PublishFailed):
    """The connection ended while the message was under way."""


class NowhereToGo(PublishFailed):
    """The message's exchange is missing, or no queue takes the message."""


@dataclass(frozen=True)
class Message:
    """What is published.

    :param mandatory: it is a failure if no queue takes it.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: pika.BasicProperties
    mandatory: bool


@dataclass(frozen=True)
class Settings:
    """What connections are like.

    :param channels: how many a connection has at most; each carries one message at a time.
    :param idle_connection: seconds after which an unused connection closes; ``None`` never.
    :param idle_channel: likewise for a channel.
    :param declarations: run before a connection's first message.
    """

    parameters: pika.connection.Parameters
    channels: int = 10
    idle_connection: float | None = None
    idle_channel: float | None = None
    declarations: Sequence[Declaration] = ()


class Pool(Protocol):
    """What a connection tells the pool."""

    def failed(self) -> None:
        """The broker could not be reached, or did not answer."""

    def forget(self, connection: Connection) -> None:
        """The connection takes no more messages."""

    def forget_idle(self, connection: Connection) -> bool:
        """As ``forget``, but only if nobody uses the connection; return whether it is so."""


class Job:
    """One message on its way, ``None`` for declarations alone, and who waits for it."""

    def __init__(self, message: Message | None) -> None:
        self.message = message
        self.future: futures.Future[None] = futures.Future()
        #: Why the broker sent it back.
        self.returned: str | None = None

    def start(self) -> bool:
        """Return whether anybody still waits for it."""
        return self.future.set_running_or_notify_cancel()

    def succeed(self) -> None:
        self.future.set_result(None)

    def fail(self, error: PublishFailed) -> None:
        self.future.set_exception(error)


class Line:
    """A channel, and the message that is under way on it."""

    def __init__(self) -> None:
        self.ready = False
        self.job: Job | None = None
        self.idle_since = 0.0

    def take_job(self) -> Job | None:
        job = self.job
        self.job = None
        self.idle_since = time.monotonic()
        return job


class Connection:
    """One connection, and the thread (greenlet) that alone touches pika's objects.

    Whoever publishes leaves a job and waits for its end. So one connection serves many,
    answers heartbeats while nobody publishes, and nobody waits longer than they want to.
    """

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self.waiting: deque[Job] = deque()
        #: Jobs that are waiting or under way; the pool's lock guards it.
        self.load = 0
        self.declared = not settings.declarations
        #: When the broker last did something.
        self.progress_at = 0.0
        self._settings = settings
        self._pool = pool
        self._loop: Any = IOLoop()
        self._socket: Any = None
        self._opened = False
        self._declaring = False
        self._lines: dict[Channel, Line] = {}
        self._cause: Any = None
        self._thread = threading.Thread(target=self._run, name="tuswsgi-amqp", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something in ``waiting``."""
        self._soon(self._pump)

    def close(self) -> None:
        self._soon(self._close)

    def give_up(self) -> None:
        """The broker does not answer. While it is being connected, pika sees to that."""
        if self._opened:
            self._pool.forget(self)
            self._soon(self._abort)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _soon(self, call: Callable[[], None]) -> None:
        try:
            self._loop.add_callback_threadsafe(call)
        except OSError:
            pass  # the loop has just ended, and with it all that was waiting

    def _run(self) -> None:
        try:
            self._socket = pika.SelectConnection(
                self._settings.parameters,
                on_open_callback=self._on_open,
                on_open_error_callback=self._on_end,
                on_close_callback=self._on_end,
                custom_ioloop=self._loop,
            )
            self._loop.start()
        except Exception as error:
            log.exception("The connection to the AMQP broker broke")
            self._cause = error
        finally:
            self._finish()

    def _finish(self) -> None:
        self._pool.forget(self)
        if not self._opened:
            self._pool.failed()
        kind = ConnectionLost if self._opened else BrokerAway
        error = kind(_text_of(self._cause))
        for line in self._lines.values():
            if (job := line.take_job()) is not None:
                job.fail(error)
        self._fail_waiting(error)
        self._loop.close()

    def _on_open(self, socket: object) -> None:
        self._opened = True
        self._progress()
        idle = [t for t in (self._settings.idle_connection, self._settings.idle_channel) if t]
        if idle:
            self._loop.call_later(min(idle) / 2, partial(self._tidy, min(idle) / 2))
        self._pump()

    def _on_end(self, socket: object, cause: object) -> None:
        self._cause = self._cause or cause
        self._loop.stop()

    def _close(self) -> None:
        if self._socket is not None and not (self._socket.is_closing or self._socket.is_closed):
            self._socket.close()
            self._loop.call_later(FAREWELL, self._abort)

    def _abort(self) -> None:
        if self._socket is not None and not self._socket.is_closed:
            # Without a word, as when heartbeats fail to come: pika has no public way.
            self._socket._terminate_stream(TimeoutError("the broker does not answer"))

    def _progress(self) -> None:
        self.progress_at = time.monotonic()

    def _pump(self) -> None:
        """Give waiting jobs to free channels, and open more where those are too few."""
        if self._socket is None or not self._socket.is_open:
            return
        if not self.declared:
            self._declare()
            return
        free = [line for line in self._lines.items() if line[1].ready and line[1].job is None]
        while self.waiting and (free or self.waiting[0].message is None):
            job = self.waiting.popleft()
            if not job.start():
                continue
            if job.message is None:
                job.succeed()
            else:
                self._publish(*free.pop(), job, job.message)
        opening = sum(not line.ready for line in self._lines.values())
        room = self._settings.channels - len(self._lines)
        for _ in range(min(len(self.waiting) - opening, room)):
            self._open_line()

    def _publish(self, channel: Channel, line: Line, job: Job, message: Message) -> None:
        line.job = job
        channel.basic_publish(
            message.exchange,
            message.routing_key,
            message.body,
            message.properties,
            mandatory=message.mandatory,
        )

    def _fail_waiting(self, error: PublishFailed) -> None:
        while self.waiting:
            job = self.waiting.popleft()
            if job.start():
                job.fail(error)

    def _tidy(self, period: float) -> None:
        """Close what was idle for too long."""
        if self._socket is None or not self._socket.is_open:
            return
        now = time.monotonic()
        limits = self._settings
        is_idle = limits.idle_connection and now - self.progress_at >= limits.idle_connection
        if is_idle and self._pool.forget_idle(self):
            self._close()
            return
        for channel, line in list(self._lines.items()):
            is_idle = line.ready and line.job is None and channel.is_open
            if limits.idle_channel and is_idle and now - line.idle_since >= limits.idle_channel:
                del self._lines[channel]
                channel.close()
        self._loop.call_later(period, partial(self._tidy, period))

    def _open_line(self) -> None:
        assert self._socket is not None
        channel = self._socket.channel(on_open_callback=self._on_line_open)
        channel.add_on_close_callback(self._on_line_closed)
        channel.add_on_return_callback(self._on_returned)
        self._lines[channel] = Line()

    def _on_line_open(self, channel: Channel) -> None:
        def confirming(frame: object) -> None:
            self._progress()
            line = self._lines[channel]
            line.ready = True
            line.idle_since = time.monotonic()
            self._pump()

        channel.confirm_delivery(partial(self._on_confirmed, channel), confirming)

    def _on_returned(self, channel: Channel, method: Any, properties: object, body: object) -> None:
        # It comes before the confirmation, which a message without a queue gets, too.
        line = self._lines.get(channel)
        if line is not None and line.job is not None:
            line.job.returned = method.reply_text

    def _on_confirmed(self, channel: Channel, frame: Any) -> None:
        self._progress()
        job = self._lines[channel].take_job()
        if job is not None:
            if isinstance(frame.method, pika.spec.Basic.Nack):
                job.fail(PublishFailed("the broker refused the message"))
            elif job.returned is not None:
                job.fail(NowhereToGo(f"the broker sent the message back: {job.returned}"))
            else:
                job.succeed()
        self._pump()

    def _on_line_closed(self, channel: Channel, reason: Exception) -> None:
        if not isinstance(reason, ChannelClosedByBroker):
            return  # it was idle, or all of the connection ends, which is told at the end
        line = self._lines.pop(channel, None)
        job = None if line is None else line.take_job()
        if job is not None:
            kind = NowhereToGo if reason.reply_code == 404 else PublishFailed
            job.fail(kind(f"{reason.reply_code} {reason.reply_text}"))
        self._pump()

    def _declare(self) -> None:
        if self._declaring:
            return
        assert self._socket is not None
        self._declaring = True
        steps = iter(self._settings.declarations)
        channel = self._socket.channel(on_open_callback=lambda channel: step(None))
        channel.add_on_close_callback(self._on_declared)

        def step(frame: object) -> None:
            self._progress()
            declare = next(steps, None)
            if declare is not None:
                declare(channel, step)
            else:
                self.declared = True
                channel.close()

    def _on_declared(self, channel: Channel, reason: Exception) -> None:
        self._declaring = False
        if not self.declared and isinstance(reason, ChannelClosedByBroker):
            self._fail_waiting(PublishFailed(f"{reason.reply_code} {reason.reply_text}"))
        self._pump()


def _text_of(cause: Any) -> str:
    """Return what pika's exceptions about a connection say when they are unwrapped."""
    if isinstance(cause, AMQPConnectionError) and isinstance((*cause.args, None)[0], Exception):
        cause = cause.args[0]
    cause = getattr(cause, "exceptions", [cause])[-1]
    return repr(getattr(cause, "exception", cause))
