"""The contract of hook transports: what they send to the application, and what it answers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar
from uuid import uuid4

from tuswsgi.core.errors import HookFailed, HookRefusal
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, Storage
from tuswsgi.observing.telemetry import hook_sent, report


@dataclass(frozen=True)
class HookRequest:
    """A hook that a transport is to send.

    :param info: the upload at the time of the hook.
    :param request: the request that caused it.
    :param location: where the upload's bytes are stored, e.g. a path; ``None`` for pre-create
        and for stores without names.
    :param id: unique; the same for every transport and every attempt.
    :param sequence: the number of the write of the record that the hook reports, from 0.
    :param deadline: until when, on the monotonic clock, the client's request waits for the
        answer; ``None`` if the transports set the only limits.
    """

    type: HookType
    info: FileInfo
    request: RequestInfo
    location: str | None = None
    id: str = field(default_factory=lambda: uuid4().hex)
    sequence: int = 0
    deadline: float | None = field(default=None, compare=False)

    def may_wait(self, seconds: float) -> bool:
        """Return whether the client's request may wait for so many more seconds."""
        return self.deadline is None or time.monotonic() + seconds < self.deadline

    def time_left(self, most: float) -> float:
        """Return how long an attempt may take, in seconds, up to `most`.

        :raises HookFailed: if the deadline has passed.
        """
        if self.deadline is None:
            return most
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise HookFailed("The request has waited for its hooks for blocking_timeout.")
        return min(most, left)

    def after(self, answer: HookResponse) -> HookRequest:
        """Return the request for the next listener: with the upload as `answer` changed it."""
        if answer.change is None:
            return self
        return replace(self, info=answer.change.applied_to(self.info))


@dataclass(frozen=True)
class ChangeFileInfo:
    """What a pre-create hook changes about an upload (tusd's ``FileInfoChanges``).

    The id and the path are validated before they are used.

    :param path: relative to the root of the data store.
    """

    id: str | None = None
    metadata: Metadata | None = None
    path: str | None = None

    def applied_to(self, info: FileInfo) -> FileInfo:
        """Return the upload with these changes."""
        storage = info.storage
        return info.replace(
            id=self.id or info.id,
            metadata=info.metadata if self.metadata is None else self.metadata,
            storage=Storage(storage.type, self.path) if self.path else storage,
        )


@dataclass(frozen=True)
class HookResponse:
    """The answer of a hook (tusd's ``HookResponse``).

    :param reject: refuse the request: ``RejectTermination`` for pre-terminate and
        ``RejectUpload`` for every other blocking hook. A 4xx refusal by pre-finish is final.
    :param status: the HTTP status for the client, ``None`` for the protocol's own.
    :param body: the body for the client, ``None`` for the protocol's own.
    :param headers: additional headers for the client.
    :param change: how to change the upload (pre-create only).
    :param stop: stop the running PATCH and terminate its upload (post-receive only).
    """

    reject: bool = False
    status: int | None = None
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    change: ChangeFileInfo | None = None
    stop: bool = False

    def followed_by(self, second: HookResponse) -> HookResponse:
        """Return two answers combined; where they contradict, `second` wins."""
        change = second.change or self.change
        if self.change is not None and second.change is not None:
            first = self.change
            last = second.change
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


#: Sends a hook to one listener: a transport, or one program or URL of a transport.
Ask = Callable[[HookRequest], HookResponse | None]


def ask_in_turn(listeners: Iterable[Ask], request: HookRequest) -> HookResponse | None:
    """Send a hook to one listener after the other, until one rejects.

    Each listener gets the upload as the answers before have changed it.

    :returns: the answers combined, ``None`` if there are none.
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
    """A transport: sends hooks to the application and returns its answers.

    :cvar name: the name in events, logs and on the command line.
    :cvar may_refuse: whether the request is refused if a blocking hook cannot be sent.
    :ivar types: the types of hooks to send.
    """

    name: ClassVar[str]
    may_refuse: ClassVar[bool] = True
    types: Collection[HookType] = frozenset()

    @property
    def forwards(self) -> Collection[str]:
        """The names of the request headers that are forwarded, in any case."""
        return ()

    def prepare(self) -> None:
        """Check the configuration. Open no connections yet: the process may fork.

        :raises ConfigurationError: if the transport cannot work as configured.
        """

    def check(self) -> None:
        """Check that hooks can be sent now. It is cheap and may be called often.

        :raises Exception: if they cannot.
        """

    @abstractmethod
    def send(self, request: HookRequest) -> HookResponse | None:
        """Send a hook and return the answer, ``None`` if there is none.

        It is called from many greenlets or threads at once and must not block the others: wait
        only on primitives that gevent patches. It must return by its timeout and by the deadline
        of `request`. If it raises, a blocking hook refuses the request, and a post-hook is
        retried.

        :raises HookRefusal: to refuse the request with an answer of the application.
        :raises HookFailed: if the application could not be reached or took too long; the request
            is answered 503. Its ``__cause__``, or its message, is logged.
        :raises HookBroken: if the answer is invalid; the request is answered 500.
        :raises Exception: treated as ``HookFailed``.
        """

    def call(self, request: HookRequest) -> HookResponse | None:
        """Call ``send``, and report its duration and outcome to the telemetry."""
        if not hook_sent.receivers:
            return self.send(request)
        began = time.monotonic()
        outcome = "failed"
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
        """Release connections and the like. The transport may be used again afterwards."""
