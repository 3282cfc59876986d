"""The contract of hooks: what is told to applications, and what they may answer.

This file owns the names of hooks and the values that pass between the protocol and the
transports. How they look in JSON is the business of payload formats.
"""

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
        return info.replace(
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
        """Release what this process holds. The transport may be used again afterwards."""
