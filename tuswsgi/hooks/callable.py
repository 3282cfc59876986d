"""Brings hooks to functions of the same process: the way of an embedding application."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, HookType

HookFunction = Callable[[HookRequest], "HookResponse | None"]


class CallableHook(Hook):
    """Calls the functions that were added for a hook, in their order.

    The first answer that refuses ends the row; otherwise the last answer counts.
    """

    name = "callable"

    def __init__(self) -> None:
        self._functions: dict[HookType, list[HookFunction]] = {}

    @property
    def types(self) -> Collection[HookType]:  # type: ignore[override]  # those with functions
        return self._functions.keys()

    def add(self, type: HookType, function: HookFunction) -> None:
        self._functions.setdefault(type, []).append(function)

    def send(self, request: HookRequest) -> HookResponse | None:
        answer = None
        for function in self._functions.get(request.type, ()):
            said = function(request)
            if not request.type.blocking and not isinstance(said, HookResponse):
                # It has done its work, and must not be called again for what it returned.
                said = None
            answer = said or answer
            if answer is not None and answer.reject:
                break
        return answer
