"""Asks blocking hooks, and decides what a refusal or a failure means for the request.

Post-hooks it only hands on: as events to be written with a change of state, and to the
delivery once that is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from tuswsgi.core.display import printable
from tuswsgi.core.errors import HookBroken, HookFailed, HookRefusal, TusError
from tuswsgi.core.events import Event, HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.core.options import KiB
from tuswsgi.hooks.answers import check_change, check_response
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn
from tuswsgi.outbox.events import event_of

log = logging.getLogger(__name__)

#: How much is shown of the names of headers, in characters.
_SHOWN_NAMES = 200


class Messenger(Protocol):
    """What brings post-hooks to their transports: ``hooks.delivery.Delivery``."""

    #: Whether events are written before they are sent.
    keeps_events: bool

    def wake(self, upload: str) -> None:
        """Deliver the events of `upload` that are written by now."""

    def send(self, hook: Hook, request: HookRequest) -> None:
        """Send a hook once, soon; nobody hears of a failure. It does not wait."""


class HookManager:
    """Knows the transports.

    :param hooks: the transports, in the order in which they are asked.
    :param follows_tusd: behave as today's tusd does where rustus does otherwise: an
        upload that one request completes is told as created, too.
    :param progress_interval: the least time between two post-receive hooks of a request,
        in seconds.
    :param blocking_timeout: for how long a request waits for one of its blocking hooks, in
        seconds; ``None`` for as long as the transports take together.
    :param max_headers: the most bytes of a request's headers that hooks are told of.
    :param locate: returns where the bytes of an upload lie.
    """

    def __init__(
        self,
        hooks: Sequence[Hook] = (),
        *,
        follows_tusd: bool = False,
        progress_interval: float = 1.0,
        blocking_timeout: float | None = None,
        max_headers: int = 64 * KiB,
        locate: Callable[[FileInfo], str | None] = lambda info: None,
    ) -> None:
        self.hooks = list(hooks)
        self.follows_tusd = follows_tusd
        self.progress_interval = progress_interval
        self.blocking_timeout = blocking_timeout
        self.max_headers = max_headers
        #: Brings post-hooks to their transports; without one they are not told at all.
        self.messenger: Messenger | None = None
        self._locate = locate

    def wants(self, type: HookType) -> bool:
        """Return whether anybody is sent hooks of this type."""
        return any(type in hook.types for hook in self.hooks)

    def told(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a request that hooks are told of.

        Clients can send megabytes of them, which every event would carry and no receiver would
        take. The longest are left out whole: what proxies add is short.

        :param headers: by their names in lower case.
        """
        surplus = sum(map(len, headers)) + sum(map(len, headers.values())) - self.max_headers
        if surplus <= 0:
            return headers
        last = {name.lower() for hook in self.hooks for name in hook.forwards}
        kept = dict(headers)
        left_out = []
        for name in sorted(kept, key=lambda name: (name in last, -len(headers[name]))):
            surplus -= len(name) + len(kept.pop(name))
            left_out.append(name)
            if surplus <= 0:
                break
        names = printable(", ".join(left_out))[:_SHOWN_NAMES]
        log.warning("Hooks are told nothing of headers that are too long: %s", names)
        return kept

    def ask(self, type: HookType, info: FileInfo, request: RequestInfo) -> HookResponse | None:
        """Run a blocking hook through every transport; the first refusal wins.

        Each transport sees the upload as those before it have changed it.

        :returns: what the answers are together, ``None`` if nobody had anything to say.
        :raises HookRefusal: if a hook refused.
        :raises HookFailed: if a hook failed, so that the client comes back.
        :raises HookBroken: if its answer cannot be obeyed.
        """
        hooks = [hook for hook in self.hooks if type in hook.types]
        if not hooks:
            return None
        sent = self._hook(type, info, request)
        if self.blocking_timeout is not None:
            sent = replace(sent, deadline=time.monotonic() + self.blocking_timeout)
        return ask_in_turn([partial(self._ask_or_refuse, hook) for hook in hooks], sent)

    def record(self, type: HookType, info: FileInfo, request: RequestInfo) -> Sequence[Event]:
        """Return the events that a change of state is to be saved with, one per transport.

        None where nobody wants them, or where post-hooks are not kept until they are
        delivered. To be followed by ``tell``.
        """
        if self.messenger is None or not self.messenger.keeps_events:
            return ()
        hooks = [hook for hook in self.hooks if type in hook.types]
        if not hooks:
            return ()
        sent = self._hook(type, info, request)
        now = time.time()
        return [event_of(sent, hook.name, now) for hook in hooks]

    def tell(self, type: HookType, info: FileInfo, request: RequestInfo) -> None:
        """Have a post-hook delivered: what ``record`` returned is saved by now.

        Progress was never recorded: it is out of date before it could be repeated.
        """
        if self.messenger is None:
            return
        hooks = [hook for hook in self.hooks if type in hook.types]
        if not hooks:
            return
        if type is not HookType.POST_RECEIVE and self.messenger.keeps_events:
            self.messenger.wake(info.id)
            return
        sent = self._hook(type, info, request)
        for hook in hooks:
            self.messenger.send(hook, sent)

    def checked(self, answer: HookResponse) -> HookResponse:
        """Return what of an answer can be obeyed.

        :raises HookBroken: if it would break something.
        """
        change = None if answer.change is None else check_change(answer.change)
        headers = check_response(answer.status, answer.headers)
        return replace(answer, change=change, headers=headers)

    def wake(self, upload: str) -> None:
        """Have the events of an upload delivered that were saved before and are due now."""
        if self.messenger is not None and self.messenger.keeps_events:
            self.messenger.wake(upload)

    def _hook(self, type: HookType, info: FileInfo, request: RequestInfo) -> HookRequest:
        location = None if type is HookType.PRE_CREATE else self._locate(info)
        # Post-hooks tell of the write that comes now; a creation is the one before all others.
        is_counted = not type.blocking and type is not HookType.POST_CREATE
        sequence = info.sequence + is_counted
        return HookRequest(type, info, request, location, sequence=sequence)

    def _send(self, hook: Hook, sent: HookRequest) -> HookResponse | None:
        try:
            answer = hook.call(sent)
        except HookRefusal as refusal:
            refusal.headers = check_response(refusal.status, refusal.headers)
            raise
        return None if answer is None else self.checked(answer)

    def _ask_or_refuse(self, hook: Hook, request: HookRequest) -> HookResponse | None:
        answer = self._ask(hook, request)
        type = request.type
        if answer is None:
            return None
        if answer.reject:
            # tusd refuses with 400 where the hook names no status.
            raise HookRefusal(answer.status or 400, answer.body, answer.headers)
        if answer.stop:
            log.warning("%s by %s: only post-receive can stop an upload", type, hook.name)
        if answer.change is not None and type is not HookType.PRE_CREATE:
            log.warning("%s by %s: only pre-create can change an upload", type, hook.name)
            return replace(answer, change=None)
        return answer

    def _ask(self, hook: Hook, sent: HookRequest) -> HookResponse | None:
        try:
            return self._send(hook, sent)
        except HookRefusal:
            raise
        except Exception as error:
            log.error(
                "%s of %s failed by %s: %s",
                sent.type,
                sent.info.id,
                hook.name,
                printable(str(error.__cause__ or error)),
                exc_info=None if isinstance(error, TusError) else error,
            )
            if not hook.may_refuse:
                return None
            raise (HookBroken if isinstance(error, HookBroken) else HookFailed) from None
