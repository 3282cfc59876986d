"""Post-hooks, from the change that they report to their delivery.

This is a transactional outbox: ``events_for`` returns the events that the info store writes in
the transaction of the change, and ``tell`` starts their delivery once that is committed.
``delivery`` sends them, in this process or in any other that shares the info store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.core.process import PerProcess
from tuswsgi.hooks.base import Hook, HookRequest
from tuswsgi.hooks.manager import HookManager
from tuswsgi.infostores.base import EventStore
from tuswsgi.outbox.delivery import Delivery
from tuswsgi.outbox.events import event_of
from tuswsgi.outbox.queues import OneShot
from tuswsgi.outbox.sending import OnAnswer
from tuswsgi.outbox.settings import DeliveryMode, DeliverySettings

log = logging.getLogger(__name__)


class Outbox:
    """The post-hooks of a server.

    Most are recorded as events and delivered at least once. A post-receive, and with
    `fire-and-forget` every post-hook, is sent once by this process instead.

    :param store: where the events are kept.
    :param hooks: the transports; may be added to later.
    :param on_answer: called with a post-receive hook whose answer stops its upload.
    """

    def __init__(
        self,
        store: EventStore,
        hooks: HookManager,
        settings: DeliverySettings,
        on_answer: OnAnswer,
    ) -> None:
        self.store = store
        self.keeps_events = settings.delivery is DeliveryMode.AT_LEAST_ONCE
        self._hooks = hooks
        self._delivery = PerProcess(lambda: Delivery(store, hooks.hooks, settings, on_answer))

    def events_for(self, type: HookType, info: FileInfo, request: RequestInfo) -> Sequence[Event]:
        """Return the events to write with a change of state, one per transport.

        :param info: what is passed to ``RecordStore.create`` or ``save`` with the events.
        """
        if not self.keeps_events:
            return ()
        hooks = self._hooks.of(type)
        if not hooks:
            return ()
        sent = self._hooks.request(type, info, request)
        now = time.time()
        return [event_of(sent, hook.name, now) for hook in hooks]

    def tell(self, type: HookType, info: FileInfo, request: RequestInfo) -> None:
        """Start the delivery of a post-hook whose events are committed. Does not wait."""
        hooks = self._hooks.of(type)
        if not hooks:
            return
        if self.keeps_events and type is not HookType.POST_RECEIVE:
            self.wake(info.id)
            return
        sent = self._hooks.request(type, info, request)
        for hook in hooks:
            self._send_once(hook, sent)

    def wake(self, upload: str) -> None:
        """Start the delivery of all committed events of an upload. Does not wait.

        Before ``start``, another process delivers them at its next poll.

        :param upload: the id of the upload.
        """
        delivery = self._delivery.peek()
        if delivery is not None and self.keeps_events:
            delivery.wake(upload)

    def start(self) -> None:
        """Begin to deliver in this process. The info store must be prepared."""
        self._delivery.get()

    def stop(self, timeout: float) -> None:
        """Begin no further delivery, and wait for those that are running.

        Events that are left are given to other processes at once. May be called again, and
        ``start`` afterwards.

        :param timeout: in seconds.
        """
        delivery = self._delivery.pop()
        if delivery is not None:
            delivery.stop(timeout)

    def _send_once(self, hook: Hook, sent: HookRequest) -> None:
        delivery = self._delivery.peek()
        if delivery is None or not delivery.queues.add_one_shot(OneShot(hook, sent)):
            log.debug("%s of %s by %s is dropped", sent.type, sent.info.id, hook.name)
