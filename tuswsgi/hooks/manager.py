"""Blocking hooks: sends them through every transport and decides what the answers mean.

A refusal, and the failure of a transport that may refuse, end the client's request.
Post-hooks are the business of ``outbox``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from tuswsgi.core.display import printable
from tuswsgi.core.errors import HookBroken, HookFailed, HookRefusal, TusError
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.hooks.answers import check_answer, check_headers
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn
from tuswsgi.hooks.settings import HookSettings

log = logging.getLogger(__name__)

#: How many characters of header names a log line shows.
_SHOWN_NAMES = 200


class HookManager:
    """The transports of a server.

    :param hooks: in the order in which they are asked.
    :param locate: returns where the bytes of an upload are stored, e.g. a path.
    :ivar follows_tusd: send hooks when tusd does where rustus differs: a post-create also
        for an upload that its POST completed.
    :ivar progress_interval: the least time between two post-receive hooks of a request, in
        seconds.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        settings: HookSettings,
        locate: Callable[[FileInfo], str | None],
    ) -> None:
        self.hooks = list(hooks)
        self.follows_tusd = settings.follows_tusd
        self.progress_interval = settings.progress_interval
        self._timeout = settings.blocking_timeout
        self._max_headers = settings.max_headers
        self._locate = locate

    def of(self, type: HookType) -> Sequence[Hook]:
        """Return the transports that send hooks of this type."""
        return [hook for hook in self.hooks if type in hook.types]

    def wants(self, type: HookType) -> bool:
        """Return whether any transport sends hooks of this type."""
        return any(type in hook.types for hook in self.hooks)

    def limit_headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of a request that hooks carry: at most `max_headers` bytes.

        Clients can send megabytes of headers, which every event would store and no receiver
        would accept. Whole headers are dropped, the longest first, since those that proxies
        add are short; headers that a transport forwards are dropped last.

        :param headers: by their names in lower case.
        """
        surplus = sum(map(len, headers)) + sum(map(len, headers.values())) - self._max_headers
        if surplus <= 0:
            return headers
        forwarded = {name.lower() for hook in self.hooks for name in hook.forwards}
        kept = dict(headers)
        dropped = []
        for name in sorted(kept, key=lambda name: (name in forwarded, -len(headers[name]))):
            surplus -= len(name) + len(kept.pop(name))
            dropped.append(name)
            if surplus <= 0:
                break
        names = printable(", ".join(dropped))[:_SHOWN_NAMES]
        log.warning("Request headers are too long, hooks are sent without these: %s", names)
        return kept

    def request(self, type: HookType, info: FileInfo, request: RequestInfo) -> HookRequest:
        """Return what the transports are to send.

        :param info: the upload. For a post-hook, its sequence is that before the write that
            the hook reports; a post-create reports the first write.
        """
        location = None if type is HookType.PRE_CREATE else self._locate(info)
        is_counted = not type.blocking and type is not HookType.POST_CREATE
        sequence = info.sequence + is_counted
        return HookRequest(type, info, request, location, sequence=sequence)

    def ask(self, type: HookType, info: FileInfo, request: RequestInfo) -> HookResponse | None:
        """Send a blocking hook through every transport until one of them refuses.

        Each transport gets the upload as the answers before have changed it.

        :returns: the answers combined, ``None`` if there are none.
        :raises HookRefusal: if a hook refused.
        :raises HookFailed: if a hook failed; the client is to try again.
        :raises HookBroken: if an answer is invalid.
        """
        hooks = self.of(type)
        if not hooks:
            return None
        sent = self.request(type, info, request)
        if self._timeout is not None:
            sent = replace(sent, deadline=time.monotonic() + self._timeout)
        return ask_in_turn([partial(self._ask, hook) for hook in hooks], sent)

    def _ask(self, hook: Hook, sent: HookRequest) -> HookResponse | None:
        answer = self._send(hook, sent)
        if answer is None:
            return None
        if answer.reject:
            # tusd refuses with 400 where the hook names no status.
            raise HookRefusal(answer.status or 400, answer.body, answer.headers)
        if answer.stop:
            log.warning("%s by %s: only post-receive can stop an upload", sent.type, hook.name)
        if answer.change is not None and sent.type is not HookType.PRE_CREATE:
            log.warning("%s by %s: only pre-create can change an upload", sent.type, hook.name)
            return replace(answer, change=None)
        return answer

    def _send(self, hook: Hook, sent: HookRequest) -> HookResponse | None:
        try:
            return self._call(hook, sent)
        except HookRefusal:
            raise
        except Exception as error:
            log.error(
                "%s of %s by %s failed: %s",
                sent.type,
                sent.info.id,
                hook.name,
                printable(str(error.__cause__ or error)),
                exc_info=None if isinstance(error, TusError) else error,
            )
            if not hook.may_refuse:
                return None
            raise (HookBroken if isinstance(error, HookBroken) else HookFailed) from None

    def _call(self, hook: Hook, sent: HookRequest) -> HookResponse | None:
        try:
            answer = hook.call(sent)
        except HookRefusal as refusal:
            refusal.headers = check_headers(refusal.status, refusal.headers)
            raise
        return None if answer is None else check_answer(answer)
