"""The contract of hooks: what is told to applications, and what they may answer.

This file owns the names of hooks and the values that pass between the protocol and the
transports. How they look in JSON is the business of payload formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tuswsgi.info import FileInfo


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
    :param headers: header names in lower case, repeated ones joined by commas.
    :param owner: who sends it, as the embedding application names them.
    """

    method: str = ""
    uri: str = ""
    remote_addr: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None


@dataclass(frozen=True)
class Event:
    """A post-hook that is to be delivered, kept beside the upload's record until it is.

    :param id: stable over retries, unique.
    :param sequence: counts the record's writes; events of an upload are told in its order.
    :param payload: the hook's payload as it was at the time of the event.
    :param held: not to be delivered before somebody frees it.
    """

    id: str
    type: HookType
    upload: str
    sequence: int
    created_at: float
    payload: Mapping[str, Any] = field(default_factory=dict)
    held: bool = False


@dataclass(frozen=True)
class HookRequest:
    """What a transport is to send."""

    type: HookType
    info: FileInfo
    request: RequestInfo


@dataclass(frozen=True)
class HookResponse:
    """What a blocking hook answered (tusd's ``HookResponse``).

    :param reject: refuse the request; a 4xx refusal by pre-finish is final.
    :param status: the HTTP status for the client, ``None`` for the protocol's own.
    :param body: the body for the client, ``None`` for the protocol's own.
    :param headers: more headers for the client.
    """

    reject: bool = False
    status: int | None = None
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Hook(ABC):
    """A transport: brings a hook to an application and brings the answer back."""

    def prepare(self) -> None:
        """Check the configuration; nothing that lives with the process is made yet.

        :raises ConfigurationError: if the transport cannot work as it is configured.
        """

    @abstractmethod
    def send(self, request: HookRequest) -> HookResponse | None:
        """Send one hook and return the answer, ``None`` if there is nothing to say.

        :raises TusError: to refuse the request with that error.
        :raises Exception: if the hook could not be reached or broke; a blocking hook then
            refuses the request with a 5xx.
        """

    def close(self) -> None:
        """Release what this process holds."""
