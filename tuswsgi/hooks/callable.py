"""Hooks as functions of the embedding application."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from tuswsgi.core.events import HookType
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn

HookFunction = Callable[[HookRequest], "HookResponse | None"]


class CallableHook(Hook):
    """Calls the functions that were added for a hook, in this order.

    The first refusal ends the calls. Otherwise the answers are combined, and each function sees
    the upload as earlier ones changed it.
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
        functions = self._functions.get(request.type, ())
        return ask_in_turn([partial(_ask, function) for function in functions], request)


def _ask(function: HookFunction, request: HookRequest) -> HookResponse | None:
    said = function(request)
    if not request.type.blocking and not isinstance(said, HookResponse):
        # Any other return value is no reason to deliver the event again.
        return None
    return said or None
