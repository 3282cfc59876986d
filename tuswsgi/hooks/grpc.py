"""Hooks as calls of a gRPC service, with tusd's messages (``proto/hook.proto``).

Services that were written for tusd work unchanged.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuswsgi.core.display import printable
from tuswsgi.core.errors import ConfigurationError, HookBroken
from tuswsgi.core.events import HookType, joined
from tuswsgi.core.options import Duration, KiB, Size, option
from tuswsgi.core.process import PerProcess, is_cooperative
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse
from tuswsgi.hooks.forwarding import forwarded
from tuswsgi.hooks.payloads import (
    BadAnswer,
    FormatName,
    PayloadFormat,
    payload_format,
    read_answer,
)
from tuswsgi.hooks.retries import PermanentFailure, TransientFailure, with_retries

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

log = logging.getLogger(__name__)

_METHOD = "/proto.HookHandler/InvokeHook"

#: Statuses after which a retry may help.
_TRANSIENT = {
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "UNKNOWN",
}


@dataclass
class GrpcHook(Hook):
    """Hooks as calls of a gRPC service.

    The message is always that of today's tusd, whatever the format of other hooks.
    ``hook-name``, ``hook-id``, ``idempotency-key``, ``hook-sequence`` and the forwarded headers of
    the client's request are metadata of the call. Every status but OK is a failure: a handler
    refuses by its answer.

    :param format: unused.
    """

    name: ClassVar[str] = "grpc"
    section: ClassVar[str] = "hooks.grpc"

    format: PayloadFormat
    endpoint: str | None = option(
        None,
        "The address of the service, e.g. `localhost:8081`. Needs `tuswsgi-server[grpc]`.",
        aliases=("hooks-grpc",),
    )
    forward_headers: tuple[str, ...] = option(
        (), "Headers of the client's request to forward as metadata."
    )
    max_metadata: int = option(
        6 * KiB,
        "The largest total size of forwarded headers; shorter ones go first. Services refuse calls "
        "with too much metadata, often more than 8 KiB.",
        kind=Size,
    )
    timeout: float = option(
        15.0,
        "The timeout of an attempt. A service that hangs delays a request by `timeout` for each "
        "attempt and `backoff` between them: 63 s by default, for each blocking hook. `[hooks] "
        "blocking_timeout` bounds the sum.",
        kind=Duration,
    )
    retries: int = option(
        3,
        "How many times to retry a blocking hook that could not be delivered. `[hooks]` "
        "configures the retries of other hooks.",
        aliases=("hooks-grpc-retry",),
    )
    backoff: float = option(1.0, "The time between two attempts.", kind=Duration)
    max_answer: int = option(64 * KiB, "The largest answer; a longer one is a failure.", kind=Size)
    secure: bool = option(False, "Use TLS.")
    server_tls_certificate: Path | None = option(
        None, "The certificate authority (PEM) to trust instead of the well-known ones."
    )
    client_tls_certificate: Path | None = option(
        None, "The certificate (PEM) that the server shows to the service (mutual TLS)."
    )
    client_tls_key: Path | None = option(None, "The private key (PEM) of that certificate.")

    def __post_init__(self) -> None:
        self._channel: PerProcess[grpc.Channel] = PerProcess(self._open)

    @property
    def forwards(self) -> Collection[str]:
        return self.forward_headers

    def prepare(self) -> None:
        try:
            import grpc  # noqa: F401
            from google.protobuf import message_factory  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"gRPC hooks need a library that is missing ({error.name}): "
                "pip install 'tuswsgi-server[grpc]'"
            ) from error
        if (self.client_tls_certificate is None) != (self.client_tls_key is None):
            raise ConfigurationError(
                "hooks.grpc: client_tls_certificate and client_tls_key need each other."
            )
        if not self.secure and (self.server_tls_certificate or self.client_tls_certificate):
            raise ConfigurationError("hooks.grpc: certificates are used only if secure is true.")
        self._certificates()

    def send(self, request: HookRequest) -> HookResponse | None:
        import grpc

        # Encoding it replaces what JSON, and a string of protobuf, cannot hold.
        payload = payload_format(FormatName.TUSD_V2).encode(request)
        message = _message(json.loads(payload))
        metadata = self._metadata(request)

        def attempt() -> Message:
            try:
                timeout = request.time_left(self.timeout)
                return self._call()(message, timeout=timeout, metadata=metadata)
            except grpc.RpcError as error:
                # The RpcError of a call is also the call, which has a status.
                code = error.code().name
                details = error.details()
            kind = TransientFailure if code in _TRANSIENT else PermanentFailure
            raise kind(f"{self.endpoint} answered {code}: {details}")

        answer = with_retries(attempt, request, retries=self.retries, backoff=self.backoff)
        return self._interpret(request, answer)

    def close(self) -> None:
        channel = self._channel.pop()
        if channel is not None:
            channel.close()

    def _call(self) -> Callable[..., Message]:
        call: Callable[..., Message] = self._channel.get().unary_unary(
            _METHOD,
            request_serializer=_message_class("HookRequest").SerializeToString,
            response_deserializer=_message_class("HookResponse").FromString,
        )
        return call

    def _metadata(self, request: HookRequest) -> list[tuple[str, str]]:
        own = {
            "hook-name": request.type.value,
            "hook-id": request.id,
            "idempotency-key": request.id,
            "hook-sequence": str(request.sequence),
        }
        names = {name.lower() for name in self.forward_headers}
        names = {name for name in names if _is_allowed(name)} - own.keys()
        return list((forwarded(request, names, _is_sendable, self.max_metadata) | own).items())

    def _interpret(self, request: HookRequest, answer: Message) -> HookResponse | None:
        try:
            return read_answer(request.type, _answer(request.type, answer))
        except BadAnswer as error:
            if request.type.blocking:
                raise HookBroken(f"The answer of {self.endpoint} is invalid: {error}") from None
            # The event has been delivered; sending it again would not improve the answer.
            reason = printable(str(error))
            log.warning("%s of %s: invalid answer: %s", request.type, request.info.id, reason)
            return None

    def _open(self) -> grpc.Channel:
        import grpc

        _be_cooperative()
        # By default gRPC waits for up to two minutes before it reconnects.
        options = [
            ("grpc.max_receive_message_length", self.max_answer),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", max(100, int(self.backoff * 1000))),
        ]
        if not self.secure:
            return grpc.insecure_channel(self.endpoint, options)
        authority, key, certificate = self._certificates()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return grpc.secure_channel(self.endpoint, credentials, options)

    def _certificates(self) -> list[bytes | None]:
        paths = (self.server_tls_certificate, self.client_tls_key, self.client_tls_certificate)
        try:
            return [None if path is None else path.read_bytes() for path in paths]
        except OSError as error:
            raise ConfigurationError(f"hooks.grpc: cannot read a certificate: {error}") from error


def _message(data: Mapping[str, Any]) -> Message:
    """Return the message for tusd's payload."""
    upload = data["Event"]["Upload"]
    request = data["Event"]["HTTPRequest"]
    info = {
        "id": upload["ID"],
        "size": upload["Size"] or 0,
        "sizeIsDeferred": upload["SizeIsDeferred"],
        "offset": upload["Offset"],
        "metaData": upload["MetaData"] or {},
        "isPartial": upload["IsPartial"],
        "isFinal": upload["IsFinal"],
        "partialUploads": upload["PartialUploads"] or [],
        "storage": upload["Storage"] or {},
    }
    cause = {
        "method": request["Method"],
        "uri": request["URI"],
        "remoteAddr": request["RemoteAddr"],
        "header": {
            name: joined(name.lower(), values) for name, values in request["Header"].items()
        },
    }
    event = {"upload": info, "httpRequest": cause}
    return _message_class("HookRequest")(type=data["Type"], event=event)


def _answer(type: HookType, message: Any) -> dict[str, Any]:
    """Return an answer in tusd's JSON format, without empty values."""
    response = message.httpResponse
    change = message.changeFileInfo
    # The message has no field for the refusal of a termination.
    reject = "RejectTermination" if type is HookType.PRE_TERMINATE else "RejectUpload"
    return _filled(
        {
            "HTTPResponse": _filled(
                {
                    "StatusCode": response.statusCode,
                    "Body": response.body,
                    "Header": dict(response.header),
                }
            ),
            reject: message.rejectUpload,
            "StopUpload": message.stopUpload,
            "ChangeFileInfo": _filled(
                {
                    "ID": change.id,
                    "MetaData": dict(change.metaData),
                    "Storage": dict(change.storage),
                }
            ),
        }
    )


def _filled(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value}


@cache
def _message_class(name: str) -> type[Message]:
    """Return the class of a message.

    It is in a descriptor pool of its own: the application may have tusd's messages, which have
    the same names.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    compiled = resources.files("tuswsgi.hooks").joinpath("proto/hook.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"proto.{name}"))


def _is_sendable(value: str) -> bool:
    # "ASCII-Value" (the protocol of gRPC over HTTP/2)
    return value.isascii() and value.isprintable()


def _is_allowed(name: str) -> bool:
    """Return whether metadata may have this name: gRPC reserves some and forbids others."""
    reserved = ("content-type", "te", "user-agent", "host", "connection", "transfer-encoding")
    is_name = re.fullmatch(r"[0-9a-z_.-]+", name) is not None
    is_own = name in reserved or name.startswith("grpc-") or name.endswith("-bin")
    return is_name and not is_own


def _be_cooperative() -> None:
    """Make gRPC cooperate with gevent, if that has patched this process.

    This must happen before the process opens its first channel. Otherwise each call blocks all
    greenlets.
    """
    if is_cooperative():
        from grpc.experimental import gevent

        gevent.init_gevent()
