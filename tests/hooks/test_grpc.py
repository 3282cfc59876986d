"""Hooks reach gRPC services, such as were written for tusd."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuswsgi.core.errors import ConfigurationError, HookFailed
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, Storage
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.grpc import GrpcHook
from tuswsgi.hooks.payloads import FormatName, payload_format
from tuswsgi.hooks.retries import PermanentFailure

grpc = pytest.importorskip("grpc")
protoc = pytest.importorskip("grpc_tools.protoc")

PROTO = Path(str(resources.files("tuswsgi.hooks").joinpath("proto")))

REQUEST = RequestInfo(
    "PATCH", "/files/one", "192.0.2.1", 4711, {"authorization": "Bearer jwt", "x-long": "x"}
)

UPLOAD = FileInfo(
    id="one",
    size=5,
    offset=3,
    metadata=Metadata.of({"filename": "nö.txt"}),
    storage=Storage("file_storage", None),
)

#: tusd's messages: those who know it find each field by its number.
FIELDS = {
    "HookRequest": "1 type string, 2 event Event",
    "Event": "1 upload FileInfo, 2 httpRequest HTTPRequest",
    "FileInfo": "1 id string, 2 size int64, 3 sizeIsDeferred bool, 4 offset int64, "
    "5 metaData map, 6 isPartial bool, 7 isFinal bool, 8 partialUploads strings, 9 storage map",
    "HTTPRequest": "1 method string, 2 uri string, 3 remoteAddr string, 4 header map",
    "HookResponse": "1 httpResponse HTTPResponse, 2 rejectUpload bool, 3 stopUpload bool, "
    "4 changeFileInfo FileInfoChanges",
    "HTTPResponse": "1 statusCode int64, 2 header map, 3 body string",
    "FileInfoChanges": "1 id string, 2 metaData map, 3 storage map",
}


def hook_of(type: HookType, info: FileInfo = UPLOAD) -> HookRequest:
    return HookRequest(type, info, REQUEST, "/data/one", id="the-hook", sequence=7)


def transport(port: int, **options: Any) -> GrpcHook:
    options = {"timeout": 20.0, "backoff": 0.01} | options
    format = payload_format(FormatName.DEFAULT)
    return GrpcHook(format=format, endpoint=f"localhost:{port}", **options)


@pytest.fixture(scope="module")
def pb2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The messages as an application compiles them for itself."""
    directory = tmp_path_factory.mktemp("stubs")
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={directory}", "hook.proto"]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, str(directory))
    try:
        yield import_module("hook_pb2")
    finally:
        sys.path.remove(str(directory))


class Service:
    """An application that handles hooks.

    :ivar behave: answers a hook, given the message and the call.
    """

    def __init__(self, pb2: ModuleType, behave: Callable[[Any, Any], Any]) -> None:
        self.pb2 = pb2
        self.behave = behave
        self.calls: list[tuple[Any, dict[str, str]]] = []
        self.port = 0

    def invoke(self, request: Any, context: Any) -> Any:
        self.calls.append((request, dict(context.invocation_metadata())))
        return self.behave(request, context)

    @contextmanager
    def serving(self, credentials: Any = None) -> Iterator[Service]:
        method = grpc.unary_unary_rpc_method_handler(
            self.invoke,
            request_deserializer=self.pb2.HookRequest.FromString,
            response_serializer=self.pb2.HookResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler("proto.HookHandler", {"InvokeHook": method})
        with ThreadPoolExecutor(20) as pool:
            server = grpc.server(pool, [handler])
            address = f"localhost:{self.port}"
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
            server.start()
            try:
                yield self
            finally:
                server.stop(None).wait()


@contextmanager
def answering(pb2: ModuleType, **answer: Any) -> Iterator[Service]:
    with Service(pb2, lambda request, context: pb2.HookResponse(**answer)).serving() as service:
        yield service


def test_the_messages_are_tusds(pb2: ModuleType) -> None:
    messages = pb2.DESCRIPTOR.message_types_by_name
    kinds = {3: "int64", 8: "bool", 9: "string"}

    def kind(field: Any) -> str:
        if field.message_type is None:
            return kinds[field.type] + ("s" if field.name == "partialUploads" else "")
        return "map" if field.message_type.GetOptions().map_entry else str(field.message_type.name)

    assert {
        name: ", ".join(f"{field.number} {field.name} {kind(field)}" for field in message.fields)
        for name, message in messages.items()
    } == FIELDS
    assert pb2.DESCRIPTOR.package == "proto"


def test_what_the_server_reads_is_compiled_of_what_handlers_compile(tmp_path: Path) -> None:
    compiled = tmp_path / "hook.binpb"
    assert protoc.main(["", f"-I{PROTO}", f"--descriptor_set_out={compiled}", "hook.proto"]) == 0
    assert compiled.read_bytes() == (PROTO / "hook.binpb").read_bytes()


def test_a_hook_is_told_as_tusd_tells_it(pb2: ModuleType) -> None:
    with answering(pb2) as service:
        hook = transport(service.port, forward_headers=("Authorization",))
        assert hook.send(hook_of(HookType.POST_FINISH)) is None
        hook.close()
    ((request, metadata),) = service.calls
    assert request.type == "post-finish"
    upload = request.event.upload
    assert (upload.id, upload.size, upload.offset, upload.sizeIsDeferred) == ("one", 5, 3, False)
    assert dict(upload.metaData) == {"filename": "nö.txt"}
    assert dict(upload.storage) == {"Type": "filestore", "Path": "/data/one"}
    cause = request.event.httpRequest
    assert (cause.method, cause.uri, cause.remoteAddr) == ("PATCH", "/files/one", "192.0.2.1:4711")
    assert dict(cause.header) == {"Authorization": "Bearer jwt", "X-Long": "x"}
    assert metadata["hook-name"] == "post-finish"
    assert metadata["hook-id"] == metadata["idempotency-key"] == "the-hook"
    assert metadata["hook-sequence"] == "7"
    assert metadata["authorization"] == "Bearer jwt"
    assert "x-long" not in metadata


@pytest.mark.parametrize("value", ["\xa0Bearer jwt", "ü", "a\x00b", "a\x1b[2J", "x" * 60_000])
@pytest.mark.parametrize("type", [HookType.PRE_CREATE, HookType.POST_FINISH])
def test_a_header_that_cannot_be_sent_stops_no_hook(
    pb2: ModuleType, type: HookType, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"authorization": value, "cookie": "a=b", "x!y": "z", "x-other": value}
    told = replace(hook_of(type), request=replace(REQUEST, headers=headers))
    with answering(pb2) as service:
        hook = transport(service.port, forward_headers=("Authorization", "Cookie", "X!Y"))
        hook.send(told)
        hook.close()
    ((request, metadata),) = service.calls
    assert request.event.httpRequest.header["Authorization"] == value
    assert "authorization" not in metadata
    assert metadata["cookie"] == "a=b"
    assert caplog.messages == [
        f"{type} of one: headers that cannot be sent are left out: authorization"
    ]


def test_a_hook_is_told_whatever_clients_say(pb2: ModuleType) -> None:
    evil = "\x00\x1b[2J\x9b\xa0\u2028\udc80"
    cause = replace(REQUEST, uri=f"/{evil}", headers={"x-evil": evil})
    with answering(pb2) as service:
        hook = transport(service.port)
        hook.send(replace(hook_of(HookType.POST_FINISH), request=cause))
        hook.close()
    ((request, _),) = service.calls
    assert request.event.httpRequest.uri == "/\x00\x1b[2J\x9b\xa0\u2028?"
    assert request.event.httpRequest.header["X-Evil"] == "\x00\x1b[2J\x9b\xa0\u2028?"


def test_before_its_creation_an_upload_has_no_id_and_may_have_no_length(pb2: ModuleType) -> None:
    with answering(pb2) as service:
        hook = transport(service.port)
        hook.send(hook_of(HookType.PRE_CREATE, UPLOAD.replace(size=None)))
        hook.close()
    upload = service.calls[0][0].event.upload
    assert (upload.id, upload.size, upload.sizeIsDeferred) == ("", 0, True)
    assert not upload.storage


def test_a_handler_can_change_an_upload_and_the_response(pb2: ModuleType) -> None:
    answer = {
        "httpResponse": {"statusCode": 202, "header": {"X-Note": "a"}, "body": "hm"},
        "changeFileInfo": {"id": "two", "metaData": {"k": "v"}, "storage": {"Path": "a/b"}},
    }
    with answering(pb2, **answer) as service:
        hook = transport(service.port)
        answered = hook.send(hook_of(HookType.PRE_CREATE))
        hook.close()
    assert answered is not None
    assert not answered.reject
    assert (answered.status, answered.body, answered.headers) == (202, "hm", {"X-Note": "a"})
    assert answered.change is not None
    assert (answered.change.id, answered.change.path) == ("two", "a/b")
    assert answered.change.metadata == Metadata.of({"k": "v"})


@pytest.mark.parametrize("type", [HookType.PRE_CREATE, HookType.PRE_TERMINATE])
def test_a_handler_refuses_every_blocking_hook_in_one_way(pb2: ModuleType, type: HookType) -> None:
    with answering(pb2, rejectUpload=True, httpResponse={"statusCode": 403}) as service:
        hook = transport(service.port)
        answered = hook.send(hook_of(type))
        hook.close()
    assert answered is not None
    assert answered.reject
    assert answered.status == 403


def test_a_handler_can_stop_an_upload(pb2: ModuleType) -> None:
    with answering(pb2, stopUpload=True) as service:
        hook = transport(service.port)
        answered = hook.send(hook_of(HookType.POST_RECEIVE))
        hook.close()
    assert answered is not None
    assert answered.stop


def test_an_answer_that_cannot_be_obeyed_is_a_failure(pb2: ModuleType) -> None:
    with answering(pb2, changeFileInfo={"metaData": {"a key": "v"}}) as service:
        hook = transport(service.port)
        with pytest.raises(HookFailed):
            hook.send(hook_of(HookType.PRE_CREATE))
        assert hook.send(hook_of(HookType.POST_FINISH)) is None
        hook.close()
    assert len(service.calls) == 2


def test_a_handler_that_breaks_is_asked_again_while_somebody_waits(pb2: ModuleType) -> None:
    def behave(request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")

    with Service(pb2, behave).serving() as service:
        hook = transport(service.port, retries=2)
        with pytest.raises(HookFailed, match="UNAVAILABLE: not yet"):
            hook.send(hook_of(HookType.PRE_CREATE))
        assert len(service.calls) == 3
        with pytest.raises(HookFailed):
            hook.send(hook_of(HookType.POST_FINISH))
        assert len(service.calls) == 4
        service.behave = lambda request, context: pb2.HookResponse()
        assert hook.send(hook_of(HookType.PRE_CREATE)) is None
        hook.close()


def test_what_no_repetition_betters_is_not_repeated(pb2: ModuleType) -> None:
    def behave(request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "never")

    with Service(pb2, behave).serving() as service:
        hook = transport(service.port)
        with pytest.raises(PermanentFailure, match="PERMISSION_DENIED"):
            hook.send(hook_of(HookType.PRE_CREATE))
        hook.close()
    assert len(service.calls) == 1


def test_a_service_that_is_down_is_met_again_when_it_is_up(pb2: ModuleType) -> None:
    service = Service(pb2, lambda request, context: pb2.HookResponse())
    with socket.create_server(("localhost", 0)) as place:
        service.port = place.getsockname()[1]
    hook = transport(service.port, retries=0)
    with pytest.raises(HookFailed, match="UNAVAILABLE"):
        hook.send(hook_of(HookType.PRE_CREATE))
    with service.serving():
        deadline = time.monotonic() + 30
        while not service.calls and time.monotonic() < deadline:
            try:
                hook.send(hook_of(HookType.PRE_CREATE))
            except HookFailed:
                time.sleep(0.05)
    assert service.calls
    hook.close()


def test_nobody_waits_for_longer_than_the_timeout(pb2: ModuleType) -> None:
    over = threading.Event()

    def behave(request: Any, context: Any) -> Any:
        over.wait(60)
        return pb2.HookResponse()

    with Service(pb2, behave).serving() as service:
        hook = transport(service.port, timeout=0.2, retries=0)
        with pytest.raises(HookFailed, match="DEADLINE_EXCEEDED"):
            hook.send(hook_of(HookType.PRE_CREATE))
        over.set()
        hook.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    paths = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


def test_both_sides_can_show_certificates(pb2: ModuleType, certificate: tuple[Path, Path]) -> None:
    shown, key = certificate
    pair = (key.read_bytes(), shown.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], shown.read_bytes(), require_client_auth=True)
    service = Service(pb2, lambda request, context: pb2.HookResponse())
    with service.serving(credentials):
        options: dict[str, Any] = {"secure": True, "server_tls_certificate": shown}
        own = {"client_tls_certificate": shown, "client_tls_key": key}
        hook = transport(service.port, **options, **own)
        hook.prepare()
        assert hook.send(hook_of(HookType.PRE_CREATE)) is None
        hook.close()
        for less in (options, {"secure": True} | own):
            stranger = transport(service.port, retries=0, **less)
            with pytest.raises(HookFailed):
                stranger.send(hook_of(HookType.PRE_CREATE))
            stranger.close()
    assert len(service.calls) == 1


def test_a_configuration_that_cannot_work_is_told_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "some.pem"
    for options in (
        {"secure": True, "client_tls_key": file},
        {"secure": False, "server_tls_certificate": file},
        {"secure": True, "server_tls_certificate": file},
    ):
        with pytest.raises(ConfigurationError, match=r"hooks\.grpc"):
            transport(1, **options).prepare()


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigurationError, match=r"tuswsgi-server\[grpc\]"):
        transport(1).prepare()


def test_hooks_wait_beside_each_other_in_a_forked_worker_under_gevent(pb2: ModuleType) -> None:
    at_once = 10
    all_here = threading.Barrier(at_once)

    def behave(request: Any, context: Any) -> Any:
        # Nobody is answered before all have asked.
        all_here.wait(60)
        return pb2.HookResponse()

    script = """
        from gevent import monkey
        monkey.patch_all()
        import os, sys, gevent
        from tuswsgi.hooks.base import HookRequest, HookType, RequestInfo
        from tuswsgi.hooks.grpc import GrpcHook
        from tuswsgi.hooks.payloads import FormatName, payload_format
        from tuswsgi.core.info import FileInfo

        hook = GrpcHook(payload_format(FormatName.V2), sys.argv[1], timeout=60.0, retries=0)
        hook.prepare()
        sent = HookRequest(HookType.PRE_CREATE, FileInfo(id="one", size=5), RequestInfo())
        worker = os.fork()
        if worker:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
        for job in gevent.joinall([gevent.spawn(hook.send, sent) for _ in range(10)]):
            job.get()
        hook.close()
        print("all", flush=True)
        os._exit(0)
    """
    with Service(pb2, behave).serving() as service:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), f"localhost:{service.port}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all\n"
    assert len(service.calls) == at_once
