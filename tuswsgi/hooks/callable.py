"""Hooks as functions of the embedding application."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from tuswsgi.core.errors import HookBroken
from tuswsgi.core.events import HookType
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn

HookFunction = Callable[[HookRequest], "HookResponse | None"]

#: Calls a function for a hook and returns what it returned.
Call = Callable[[HookFunction, HookRequest], object]


def _call(function: HookFunction, request: HookRequest) -> object:
    return function(request)


class CallableHook(Hook):
    """Calls the functions that were added for a hook, in this order.

    The first refusal ends the calls. Otherwise the answers are combined, and each function sees
    the upload as earlier ones changed it.

    :param call: calls a function; the application's framework may want to be asked.
    """

    name = "callable"

    def __init__(self, call: Call = _call) -> None:
        self._call = call
        self._functions: dict[HookType, list[HookFunction]] = {}

    @property
    def types(self) -> Collection[HookType]:  # type: ignore[override]  # those with functions
        return self._functions.keys()

    def add(self, type: HookType, function: HookFunction) -> None:
        self._functions.setdefault(type, []).append(function)

    def send(self, request: HookRequest) -> HookResponse | None:
        functions = self._functions.get(request.type, ())
        return ask_in_turn([partial(self._ask, function) for function in functions], request)

    def _ask(self, function: HookFunction, request: HookRequest) -> HookResponse | None:
        answer = self._call(function, request)
        if answer is None or isinstance(answer, HookResponse):
            return answer
        if not request.type.blocking:
            # Any other return value is no reason to deliver the event again.
            return None
        name = getattr(function, "__qualname__", repr(function))
        raise HookBroken from TypeError(
            f"{name} returned {answer!r}; a hook returns a HookResponse or None"
        )
