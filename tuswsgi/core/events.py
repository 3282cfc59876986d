"""The moments in an upload's life that applications are told of, and what is told of them.

This file owns the names of hooks, the request that is the cause of one, and the event that is
kept until somebody delivered it. How they are sent, and what may be answered, is the business of
``hooks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class HookType(str, Enum):
    """A moment in an upload's life. The names are tusd's and rustus'."""

    PRE_ACCESS = "pre-access"
    PRE_CREATE = "pre-create"
    POST_CREATE = "post-create"
    POST_RECEIVE = "post-receive"
    PRE_FINISH = "pre-finish"
    POST_FINISH = "post-finish"
    PRE_TERMINATE = "pre-terminate"
    POST_TERMINATE = "post-terminate"
    PRE_GET = "pre-get"

    def __str__(self) -> str:
        return self.value

    @property
    def blocking(self) -> bool:
        """Whether the request waits for the hook, which may then refuse it."""
        return self.value.startswith("pre-")


@dataclass(frozen=True)
class RequestInfo:
    """The request that is the cause of a hook.

    :param uri: path and query as the client sent them.
    :param remote_addr: the client's address, with a proxy looked through if that is
        configured; ``None`` where the server does not know it.
    :param remote_port: the client's port, where no proxy hides it.
    :param headers: header names in lower case, repeated ones joined as one value.
    :param repeated: the values of those headers that came more than once, one by one, where the
        server tells them apart.
    :param owner: who sends it, as the embedding application names them.
    """

    method: str = ""
    uri: str = ""
    remote_addr: str | None = None
    remote_port: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None
    repeated: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def fields(self) -> Mapping[str, Sequence[str]]:
        """All headers with all of their values."""
        return {name: self.repeated.get(name, (text,)) for name, text in self.headers.items()}


def joined(name: str, values: Sequence[str]) -> str:
    """Return the values of a header that came more than once as one.

    They are joined by commas (RFC 9110, 5.3), but those of Cookie as browsers do it (RFC 6265,
    5.4).

    :param name: in lower case.
    """
    return ("; " if name == "cookie" else ",").join(values)


@dataclass(frozen=True)
class Event:
    """A post-hook that is to be delivered by one transport.

    It is written with the change of state that it tells of and kept until it is
    delivered, so that it survives the death of every process. Its `id` is that of the
    hook, so an event is found by its id and its transport.

    :param sequence: counts the record's writes; the events of an upload are delivered in
        its order, separately for each transport.
    :param payload: what ``hooks.events`` makes of the ``HookRequest``.
    :param due_at: not to be delivered before this time.
    :param attempts: how often its delivery failed.
    :param error: why it failed the last time.
    :param dead: given up; it is kept for the operator and holds up no other event.
    """

    id: str
    type: HookType
    upload: str
    sequence: int
    created_at: float
    transport: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)
    due_at: float = 0.0
    attempts: int = 0
    error: str | None = None
    dead: bool = False
