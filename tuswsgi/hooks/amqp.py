"""Hooks as messages to an AMQP broker such as RabbitMQ, as in rustus, or as Celery tasks.

This file owns exchanges, queues, routing keys and the format of messages; ``connections.amqp``
publishes them. Messages have no answer, so this transport never refuses a request.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from uuid import NAMESPACE_OID, UUID, uuid5

from marshmallow.validate import Range

from tuswsgi.core.errors import HookFailed
from tuswsgi.core.events import HookType
from tuswsgi.core.options import Duration, option
from tuswsgi.core.process import PerProcess
from tuswsgi.hooks.base import Hook, HookRequest
from tuswsgi.hooks.payloads import PayloadFormat

if TYPE_CHECKING:
    from pika.adapters.blocking_connection import BlockingChannel

    from tuswsgi.connections.amqp import Broker
    from tuswsgi.connections.amqp_connection import Message

log = logging.getLogger(__name__)


@dataclass(eq=False)
class AmqpHook(Hook):
    """Hooks as messages to an AMQP broker.

    With `routing_key` set, all hooks have this routing key, and one queue. Otherwise the routing
    key of a hook, and the name of its queue, is ``<prefix>.<hook>``. Messages are persistent, and
    the broker confirms them. They have the headers ``Hook-Name``, ``Hook-Id`` (the same in every
    attempt) and ``Hook-Sequence``.

    An unroutable message is a failure if the queues are declared here (they are then declared
    again) or if `routing_key` is set: Celery's queue does not exist before its first worker has
    started. Post-hooks are retried until there is a queue. Otherwise the application binds queues
    for the hooks that it wants and the broker drops the others, as in rustus.

    While the broker is unavailable, hooks fail at once, except for an attempt every 1 to 5
    seconds. If the broker hangs, that attempt delays its request by `timeout`.

    :param format: the format of the body.
    """

    name: ClassVar[str] = "amqp"
    may_refuse: ClassVar[bool] = False
    section: ClassVar[str] = "hooks.amqp"

    format: PayloadFormat
    url: str | None = option(
        None,
        "The URL of the broker: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS. "
        "The query may have settings of pika, e.g. `?heartbeat=30`.",
        rustus="HOOKS_AMQP_URL",
        secret=True,
    )
    exchange: str = option("rustus", "The exchange to publish to.", rustus="HOOKS_AMQP_EXCHANGE")
    exchange_kind: str = option(
        "topic",
        "The kind of the exchange to declare: `topic`, `direct`, `fanout`, or one that a plugin of "
        "the broker adds.",
        rustus="HOOKS_AMQP_EXCHANGE_KIND",
    )
    routing_key: str | None = option(
        None,
        "The routing key of all messages, and the name of their queue. Without it each hook "
        "has its own: `<prefix>.<hook>`, e.g. `rustus.post-finish`.",
        rustus="HOOKS_AMQP_ROUTING_KEY",
    )
    queues_prefix: str = option(
        "rustus",
        "The prefix of queue names and routing keys.",
        rustus="HOOKS_AMQP_QUEUES_PREFIX",
    )
    declare_exchange: bool = option(
        False, "Declare the exchange.", rustus="HOOKS_AMQP_DECLARE_EXCHANGE"
    )
    declare_queues: bool = option(
        False,
        "Declare the queues of the enabled hooks and bind them to the exchange.",
        rustus="HOOKS_AMQP_DECLARE_QUEUES",
    )
    durable_exchange: bool = option(
        False,
        "Declare the exchange as durable: it survives a restart of the broker.",
        rustus="HOOKS_AMQP_DURABLE_EXCHANGE",
        # The name in rustus' binary, unlike its documentation.
        aliases=("hooks_amqp_durable_exchange",),
    )
    durable_queues: bool = option(
        False,
        "Declare queues as durable: they survive a restart of the broker, with their messages.",
        rustus="HOOKS_AMQP_DURABLE_QUEUES",
    )
    auto_delete: bool = option(
        False,
        "Declare the exchange and queues as auto-delete: the broker deletes them when they are no "
        "longer used.",
        rustus="HOOKS_AMQP_AUTO_DELETE",
    )
    celery: bool = option(
        False,
        "Send messages as Celery tasks.",
        rustus="HOOKS_AMQP_CELERY",
    )
    task_prefix: str = option(
        "rustus", "The prefix of the names of Celery tasks, e.g. `rustus.post-finish`."
    )
    connection_pool_size: int = option(
        10,
        "The largest number of connections of a worker process.",
        rustus="HOOKS_AMQP_CONNECTION_POOL_SIZE",
        validate=Range(min=1),
    )
    channel_pool_size: int = option(
        10,
        "Has no effect; accepted for rustus' configurations. A connection has one channel, which "
        "carries one message at a time; another connection is opened when all are busy.",
        rustus="HOOKS_AMQP_CHANNEL_POOL_SIZE",
        validate=Range(min=1, max=2047),
    )
    idle_connection_timeout: float | None = option(
        None,
        "Close connections that were unused for this long; without it they stay open.",
        kind=Duration,
        rustus="HOOKS_AMQP_IDLE_CONNECTION_TIMEOUT",
    )
    idle_channels_timeout: float | None = option(
        None,
        "Close channels that were unused for this long; without it they stay open.",
        kind=Duration,
        rustus="HOOKS_AMQP_IDLE_CHANNELS_TIMEOUT",
    )
    timeout: float = option(
        1.0,
        "How long a blocking hook may delay a request. Other hooks have 10 seconds, or this if it "
        "is longer.",
        kind=Duration,
    )

    def __post_init__(self) -> None:
        self._broker: PerProcess[Broker] = PerProcess(self._connect)

    def prepare(self) -> None:
        """Check the URL and, if the broker can be reached, declare the exchange and queues.

        A failure of the broker is logged, so that the server accepts uploads without it. The
        first hook tries again.
        """
        from tuswsgi.connections.amqp_connection import PublishFailed

        broker = self._connect()
        try:
            broker.declare(self.timeout)
        except PublishFailed as error:
            log.warning("Hooks cannot be sent to the AMQP broker now: %s", error)
        finally:
            broker.close()

    def check(self) -> None:
        from tuswsgi.connections.amqp_connection import PublishFailed

        try:
            self._broker.get().declare(self.timeout)
        except PublishFailed as error:
            raise HookFailed from error

    def close(self) -> None:
        broker = self._broker.pop()
        if broker is not None:
            broker.close()

    def send(self, request: HookRequest) -> None:
        from tuswsgi.connections.amqp import PATIENCE
        from tuswsgi.connections.amqp_connection import PublishFailed

        message = self._message(request)
        timeout = self.timeout if request.type.blocking else max(self.timeout, PATIENCE)
        timeout = request.time_left(timeout)
        try:
            self._broker.get().publish(message, timeout)
        except PublishFailed as error:
            raise HookFailed from error

    def _connect(self) -> Broker:
        from tuswsgi.connections.amqp import Broker, PoolSettings, parse_url

        settings = PoolSettings(
            parse_url(self.url or ""),
            size=self.connection_pool_size,
            idle_connection=self.idle_connection_timeout,
            idle_channel=self.idle_channels_timeout,
            declare=self._declare if self.declare_exchange or self.declare_queues else None,
        )
        return Broker(settings)

    def _message(self, request: HookRequest) -> Message:
        import pika

        from tuswsgi.connections.amqp_connection import Message

        text = self.format.encode(request)
        headers: dict[str, object] = {
            "Hook-Name": str(request.type),
            "Hook-Id": request.id,
            "Hook-Sequence": request.sequence,
        }
        if self.celery:
            # Version 2 of Celery's protocol: positional and keyword arguments, and embedded
            # callbacks.
            text = f"[[{text}], {{}}, {{}}]"
            headers |= {"id": _task_id(request.id), "task": f"{self.task_prefix}.{request.type}"}
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            headers=headers,
            delivery_mode=pika.DeliveryMode.Persistent.value,
            message_id=request.id,
            correlation_id=_task_id(request.id) if self.celery else request.id,
        )
        mandatory = self.declare_queues or self.routing_key is not None
        key = self._routing_key(request.type)
        return Message(self.exchange, key, text.encode(), properties, mandatory)

    def _routing_key(self, type: HookType) -> str:
        """Return the routing key of a hook, which is also the name of its queue."""
        return self.routing_key or f"{self.queues_prefix}.{type}"

    def _declare(self, channel: BlockingChannel) -> None:
        # The exchange without a name always exists, and every queue is bound to it.
        if self.declare_exchange and self.exchange:
            channel.exchange_declare(
                self.exchange,
                self.exchange_kind,
                durable=self.durable_exchange,
                auto_delete=self.auto_delete,
            )
        if not self.declare_queues:
            return
        for name in sorted({self._routing_key(type) for type in self.types}):
            channel.queue_declare(name, durable=self.durable_queues, auto_delete=self.auto_delete)
            if self.exchange:
                channel.queue_bind(name, self.exchange, routing_key=name)


def _task_id(id: str) -> str:
    """Return the UUID of a hook's Celery task, the same in every attempt."""
    try:
        return str(UUID(id))
    except ValueError:
        return str(uuid5(NAMESPACE_OID, id))
