"""The contract of hooks: what is told to applications, and what they may answer.

This file owns the names of hooks and the values that pass between the protocol and the
transports. How they look in JSON is the business of payload formats.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar
from uuid import uuid4

from tuswsgi.errors import HookFailed, HookRefusal
from tuswsgi.info import FileInfo, Metadata, Storage
from tuswsgi.telemetry import hook_sent, report


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
class HookRequest:
    """What a transport is to send.

    :param info: the upload at the time of the event.
    :param location: where its bytes lie, e.g. a path in the file system; ``None`` where
        there is nothing to show (pre-create, stores without names).
    :param id: unique, and the same for every transport and every repetition.
    :param sequence: counts the record's writes; 0 where there was none.
    :param deadline: until when, on the monotonic clock, the client's request waits for the
        answer; ``None`` for as long as the transports take.
    """

    type: HookType
    info: FileInfo
    request: RequestInfo
    location: str | None = None
    id: str = field(default_factory=lambda: uuid4().hex)
    sequence: int = 0
    deadline: float | None = field(default=None, compare=False)

    def may_wait(self, seconds: float) -> bool:
        """Return whether the client's request may wait for so long from now on."""
        return self.deadline is None or time.monotonic() + seconds < self.deadline

    def time_left(self, most: float) -> float:
        """Return how long an attempt may take, in seconds, up to `most`.

        :raises HookFailed: if time is over.
        """
        if self.deadline is None:
            return most
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise HookFailed("The request waited as long as it may (blocking_timeout).")
        return min(most, left)

    def after(self, answer: HookResponse) -> HookRequest:
        """Return what the next listener is to see: the upload as `answer` changed it."""
        if answer.change is None:
            return self
        return replace(self, info=answer.change.applied_to(self.info))


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


@dataclass(frozen=True)
class ChangeFileInfo:
    """What a pre-create hook wants an upload to be (tusd's ``FileInfoChanges``).

    Nothing of it is trusted: ids and paths are checked like everything from outside.

    :param path: relative to the data store's root.
    """

    id: str | None = None
    metadata: Metadata | None = None
    path: str | None = None

    def applied_to(self, info: FileInfo) -> FileInfo:
        """Return an upload as the hook wants it."""
        storage = info.storage
        return info.but(
            id=self.id or info.id,
            metadata=info.metadata if self.metadata is None else self.metadata,
            storage=Storage(storage.type, self.path) if self.path else storage,
        )


@dataclass(frozen=True)
class HookResponse:
    """What a hook answered (tusd's ``HookResponse``).

    :param reject: refuse the request: ``RejectTermination`` for pre-terminate and
        ``RejectUpload`` for every other blocking hook. A 4xx refusal by pre-finish is final.
    :param status: the HTTP status for the client, ``None`` for the protocol's own.
    :param body: the body for the client, ``None`` for the protocol's own.
    :param headers: more headers for the client.
    :param change: what pre-create changes.
    :param stop: end the PATCH that is running, and its upload (post-receive).
    """

    reject: bool = False
    status: int | None = None
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    change: ChangeFileInfo | None = None
    stop: bool = False

    def followed_by(self, second: HookResponse) -> HookResponse:
        """Return two answers as one; where both say something `second` counts."""
        change = second.change or self.change
        if self.change is not None and second.change is not None:
            first, last = self.change, second.change
            change = ChangeFileInfo(
                last.id or first.id,
                first.metadata if last.metadata is None else last.metadata,
                last.path or first.path,
            )
        return HookResponse(
            reject=self.reject or second.reject,
            status=second.status or self.status,
            body=self.body if second.body is None else second.body,
            headers={**self.headers, **second.headers},
            change=change,
            stop=self.stop or second.stop,
        )


#: Asks one listener: a transport, or one of the programs or URLs of a transport.
Ask = Callable[[HookRequest], HookResponse | None]


def ask_in_turn(listeners: Iterable[Ask], request: HookRequest) -> HookResponse | None:
    """Ask one listener after the other, until one rejects.

    Each of them sees the upload as those before it have changed it.

    :returns: what the answers are together, ``None`` if nobody had anything to say.
    """
    answer: HookResponse | None = None
    for ask in listeners:
        more = ask(request)
        if more is None:
            continue
        answer = more if answer is None else answer.followed_by(more)
        if answer.reject:
            break
        request = request.after(more)
    return answer


class Hook(ABC):
    """A transport: brings a hook to an application and brings the answer back.

    :cvar name: by which events, logs and the command line call it.
    :cvar may_refuse: whether its failure to deliver a blocking hook refuses the request.
    :ivar types: the hooks that it is sent.
    """

    name: ClassVar[str]
    may_refuse: ClassVar[bool] = True
    types: Collection[HookType] = frozenset()

    @property
    def forwards(self) -> Collection[str]:
        """The names of the client's headers that are sent along, in any case."""
        return ()

    def prepare(self) -> None:
        """Check the configuration; nothing that lives with the process is made yet.

        :raises ConfigurationError: if the transport cannot work as it is configured.
        """

    def check(self) -> None:
        """Find out, at little cost, whether hooks can be sent now. May be called often.

        :raises Exception: if they cannot.
        """

    @abstractmethod
    def send(self, request: HookRequest) -> HookResponse | None:
        """Send one hook and return the answer, ``None`` if there is nothing to say.

        It may be called from many greenlets or threads at once, and must not block the
        others: no waiting but on gevent's (patched) primitives. It always ends, after its
        timeout at the latest and at the hook's deadline. For a blocking hook the request
        waits; for a post-hook the caller repeats what failed.

        :raises HookRefusal: to refuse the request with the application's own answer.
        :raises HookFailed: if the hook could not be reached or took too long; a blocking
            hook then refuses the request with a 503. The cause is its ``__cause__`` or its
            message for the log.
        :raises HookBroken: likewise with a 500, if the answer cannot be understood.
        :raises Exception: as ``HookFailed``, for everything that nobody thought of.
        """

    def call(self, request: HookRequest) -> HookResponse | None:
        """Do as ``send``, and tell those of it who count."""
        if not hook_sent.receivers:
            return self.send(request)
        began, outcome = time.monotonic(), "failed"
        try:
            answer = self.send(request)
            outcome = "refused" if answer is not None and answer.reject else "ok"
            return answer
        except HookRefusal as refusal:
            if request.type.blocking and refusal.status < 500:
                outcome = "refused"
            raise
        finally:
            report(
                hook_sent,
                self,
                type=request.type,
                transport=self.name,
                seconds=time.monotonic() - began,
                outcome=outcome,
            )

    def close(self) -> None:
        """Release what this process holds. The transport may be used again afterwards."""
