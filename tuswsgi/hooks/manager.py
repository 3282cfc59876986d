"""Asks blocking hooks, and decides what a refusal or a failure means for the request."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from uuid import uuid4

from tuswsgi.errors import HookFailed, HookRefusal, TusError
from tuswsgi.hooks.base import Event, Hook, HookRequest, HookResponse, HookType, RequestInfo
from tuswsgi.info import FileInfo

log = logging.getLogger(__name__)


class HookManager:
    """Knows the transports and which hooks are enabled.

    :param hooks: the transports, in the order in which they are asked.
    :param enabled: the hooks that are sent at all.
    """

    def __init__(
        self, hooks: Sequence[Hook] = (), enabled: Collection[HookType] = frozenset()
    ) -> None:
        self.hooks = list(hooks)
        self.enabled = set(enabled)

    def ask(self, type: HookType, info: FileInfo, request: RequestInfo) -> HookResponse | None:
        """Run a blocking hook through every transport; the first refusal wins.

        :returns: the last answer, ``None`` if nobody had anything to say.
        :raises HookRefusal: if a hook refused.
        :raises HookFailed: if a hook broke, so that the client comes back.
        """
        if type not in self.enabled:
            return None
        answer = None
        for hook in self.hooks:
            answer = self._send(hook, HookRequest(type, info, request)) or answer
            if answer is not None and answer.reject:
                # tusd refuses with 400 where the hook names no status.
                raise HookRefusal(answer.status or 400, answer.body, answer.headers)
        return answer

    def record(self, type: HookType, info: FileInfo, request: RequestInfo) -> Sequence[Event]:
        """Return the events that a change of state is to be saved with: none, or the one."""
        if type not in self.enabled:
            return ()
        return (Event(uuid4().hex, type, info.id, info.sequence + 1, time.time()),)

    def _send(self, hook: Hook, request: HookRequest) -> HookResponse | None:
        try:
            return hook.send(request)
        except TusError:
            raise
        except Exception:
            log.exception(
                "%s of %s failed in %s", request.type, request.info.id, hook.__class__.__name__
            )
            raise HookFailed from None
