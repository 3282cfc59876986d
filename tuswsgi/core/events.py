"""The types of hooks, the request that causes one, and the event that waits for delivery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal


class HookType(str, Enum):
    """The type of a hook. The names are those of tusd and rustus."""

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
        """Whether the request waits for the hook, which may refuse it."""
        return self.value.startswith("pre-")


#: The values of ``HookType``, for type checkers.
HookName = Literal[
    "pre-access",
    "pre-create",
    "post-create",
    "post-receive",
    "pre-finish",
    "post-finish",
    "pre-terminate",
    "post-terminate",
    "pre-get",
]


@dataclass(frozen=True)
class RequestInfo:
    """The request that causes a hook.

    :param uri: path and query as the client sent them.
    :param remote_addr: the client's address, behind a trusted proxy too; ``None`` if the server
        does not know it.
    :param remote_port: the client's port, ``None`` behind a proxy.
    :param headers: header names in lower case; repeated headers are joined.
    :param repeated: the single values of repeated headers, if the server keeps them apart.
    :param owner: the user, as the embedding application identifies them.
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
        """All headers with their single values."""
        return {name: self.repeated.get(name, (text,)) for name, text in self.headers.items()}


def joined(name: str, values: Sequence[str]) -> str:
    """Return the values of a repeated header as one.

    They are joined by commas (RFC 9110, 5.3), those of Cookie by semicolons (RFC 6265, 5.4).

    :param name: in lower case.
    """
    return ("; " if name == "cookie" else ",").join(values)


@dataclass(frozen=True)
class Event:
    """A post-hook to be delivered through one transport.

    It is written in one transaction with the change that it reports, and kept until it is
    delivered, so that no crash loses it. All transports share the `id` of a hook, so an event is
    identified by its id and its transport.

    :param upload: the id of the upload.
    :param sequence: the number of the write of the record that the hook reports. Each transport
        gets the events of an upload in this order.
    :param payload: what ``outbox.events`` makes of the ``HookRequest``.
    :param due_at: the time before which it is not delivered.
    :param attempts: how often its delivery has failed.
    :param error: why it failed the last time.
    :param dead: whether it is a dead letter: it is kept for the operator, and does not hold up
        the next event of its upload.
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
