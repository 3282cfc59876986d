"""Brings hooks to an AMQP broker such as RabbitMQ, as rustus does, also as tasks of Celery.

This file owns exchanges, queues, routing keys and what a message looks like; connections
are the business of ``connections.amqp``. A broker says nothing about an upload: it gets
every hook and refuses none.
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

#: AMQP's mark of messages that a durable queue keeps over a restart of the broker.
_PERSISTENT = 2


@dataclass(eq=False)
class AmqpHook(Hook):
    """Hooks as messages to an AMQP broker.

    Without a routing key each hook has its own, ``<prefix>.<hook>``, and a queue of that
    name; with one there is one queue for all. Messages are persistent and confirmed by the
    broker. They have the headers ``Hook-Name``, ``Hook-Id`` (the same for every repetition)
    and ``Hook-Sequence``.

    A message that no queue takes is a failure where somebody is expected to listen: if the
    queues are declared here (they are then declared once more), and if there is a routing
    key, as for Celery, whose queue appears when its first worker starts. A post-hook is then
    repeated until there is a queue. Where each hook has a routing key of its own and queues
    are the application's, it subscribes to what it likes, and the rest is dropped, as in
    rustus: a hook that nobody wants must not hold up those after it.

    While the broker is away, blocking hooks are skipped at once but for an attempt every 1
    to 5 seconds; that one costs its request `timeout` if the broker hangs.

    :param format: what the body looks like.
    """

    name: ClassVar[str] = "amqp"
    may_refuse: ClassVar[bool] = False
    section: ClassVar[str] = "hooks.amqp"

    format: PayloadFormat
    url: str | None = option(
        None,
        "The broker: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS; pika's "
        "settings can follow, e.g. `?heartbeat=30`.",
        rustus="HOOKS_AMQP_URL",
        secret=True,
    )
    exchange: str = option(
        "rustus", "The exchange that messages are sent to.", rustus="HOOKS_AMQP_EXCHANGE"
    )
    exchange_kind: str = option(
        "topic",
        "The kind of the exchange where it is declared: `topic`, `direct`, `fanout`, or what a "
        "plugin of the broker adds.",
        rustus="HOOKS_AMQP_EXCHANGE_KIND",
    )
    routing_key: str | None = option(
        None,
        "The routing key of all messages, and the name of the one queue. Without it each hook "
        "has its own: `<prefix>.<hook>`, e.g. `rustus.post-finish`.",
        rustus="HOOKS_AMQP_ROUTING_KEY",
    )
    queues_prefix: str = option(
        "rustus",
        "What the names of queues and routing keys begin with.",
        rustus="HOOKS_AMQP_QUEUES_PREFIX",
    )
    declare_exchange: bool = option(
        False, "Create the exchange.", rustus="HOOKS_AMQP_DECLARE_EXCHANGE"
    )
    declare_queues: bool = option(
        False,
        "Create the queues of the enabled hooks and bind them to the exchange.",
        rustus="HOOKS_AMQP_DECLARE_QUEUES",
    )
    durable_exchange: bool = option(
        False,
        "Create an exchange that outlives a restart of the broker.",
        rustus="HOOKS_AMQP_DURABLE_EXCHANGE",
        # So the binary of rustus calls it, unlike its documentation.
        aliases=("hooks_amqp_durable_exchange",),
    )
    durable_queues: bool = option(
        False,
        "Create queues that outlive a restart of the broker, with their messages.",
        rustus="HOOKS_AMQP_DURABLE_QUEUES",
    )
    auto_delete: bool = option(
        False,
        "Create an exchange and queues that the broker removes when nobody uses them any more.",
        rustus="HOOKS_AMQP_AUTO_DELETE",
    )
    celery: bool = option(
        False,
        "Send messages that are tasks for a worker of Celery.",
        rustus="HOOKS_AMQP_CELERY",
    )
    task_prefix: str = option(
        "rustus", "What the names of Celery's tasks begin with: `rustus.post-finish`."
    )
    connection_pool_size: int = option(
        10,
        "The most connections of a worker process.",
        rustus="HOOKS_AMQP_CONNECTION_POOL_SIZE",
        validate=Range(min=1),
    )
    channel_pool_size: int = option(
        10,
        "The most channels of a connection. It has one, which carries one message at a time; "
        "another connection is opened when all are busy.",
        rustus="HOOKS_AMQP_CHANNEL_POOL_SIZE",
        validate=Range(min=1, max=2047),
    )
    idle_connection_timeout: float | None = option(
        None,
        "Close connections that are not used for this long; without it they stay open.",
        kind=Duration,
        rustus="HOOKS_AMQP_IDLE_CONNECTION_TIMEOUT",
    )
    idle_channels_timeout: float | None = option(
        None,
        "Close channels that are not used for this long; without it they stay open.",
        kind=Duration,
        rustus="HOOKS_AMQP_IDLE_CHANNELS_TIMEOUT",
    )
    timeout: float = option(
        1.0,
        "How long a request may wait for the broker with a blocking hook. Others, which no "
        "request waits for, have 10 seconds, or this if it is longer.",
        kind=Duration,
    )

    def __post_init__(self) -> None:
        self._broker: PerProcess[Broker] = PerProcess(self._connect)

    def prepare(self) -> None:
        """Check the URL, and declare what is to be declared if the broker can be reached.

        What the broker has against it is logged and tried again with the first hook: it is
        no reason to take no uploads.
        """
        from tuswsgi.connections.amqp_connection import PublishFailed

        broker = self._connect()
        try:
            broker.declare(self.timeout)
        except PublishFailed as error:
            log.warning("The AMQP broker cannot be used for hooks now: %s", error)
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
            # Version 2 of Celery's protocol: arguments, named arguments, and what to embed.
            text = f"[[{text}], {{}}, {{}}]"
            headers |= {"id": _task_id(request.id), "task": f"{self.task_prefix}.{request.type}"}
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            headers=headers,
            delivery_mode=_PERSISTENT,
            message_id=request.id,
            correlation_id=_task_id(request.id) if self.celery else request.id,
        )
        mandatory = self.declare_queues or self.routing_key is not None
        key = self._routing_key(request.type)
        return Message(self.exchange, key, text.encode(), properties, mandatory)

    def _routing_key(self, type: HookType) -> str:
        """Return the routing key of a hook, which is its queue's name, too."""
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
    """Return the UUID that Celery is to know a hook by, the same for every repetition."""
    try:
        return str(UUID(id))
    except ValueError:
        return str(uuid5(NAMESPACE_OID, id))
