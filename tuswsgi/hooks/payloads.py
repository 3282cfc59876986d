"""The JSON of hooks: the payload formats of rustus and tusd, and tusd's answer.

All transports use them. This file checks the types of answers; ``hooks.answers`` checks whether
the values are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, pre_load

from tuswsgi.core.errors import InvalidMetadata
from tuswsgi.core.events import HookType
from tuswsgi.core.info import Metadata
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse

#: Built once: ``json.dumps`` with arguments builds an encoder for each call. As in rustus and
#: tusd, characters beyond ASCII are not escaped.
_encoder = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)

#: tusd's names of stores; the other stores have rustus' names.
_TUSD_STORES = {"file_storage": "filestore"}


class FormatName(str, Enum):
    """The formats: the first three are rustus', the last is that of tusd 2."""

    DEFAULT = "default"
    V2 = "v2"
    TUSD = "tusd"
    TUSD_V2 = "tusd-v2"


class BadAnswer(ValueError):
    """An answer is invalid."""


class _Part(fields.Nested):
    """A nested object whose values are those of the whole hook."""

    def get_value(self, obj: Any, attr: str, accessor: Any = None, default: Any = None) -> Any:
        return obj


class _Pairs(fields.Field[dict[str, str]]):
    """Metadata as text; bytes that are not UTF-8 are replaced, as in Go's JSON."""

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> dict[str, str]:
        return {key: data.decode("utf-8", "replace") for key, data in value.items()}


class _Parts(fields.Field[list[str]]):
    """The ids of a final upload's parts; null for every other upload."""

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> list[str] | None:
        return list(value) or None


class _RustusUpload(Schema):
    """rustus' ``FileInfo`` (src/file_info.rs)."""

    id = fields.String(attribute="info.id")
    offset = fields.Integer(attribute="info.offset")
    length = fields.Integer(attribute="info.size")
    path = fields.Function(lambda hook: _location(hook))
    created_at = fields.Integer(attribute="info.created_at")
    deferred_size = fields.Function(lambda hook: hook.info.size is None)
    is_partial = fields.Boolean(attribute="info.is_partial")
    is_final = fields.Boolean(attribute="info.is_final")
    parts = _Parts(attribute="info.partial_uploads")
    storage = fields.String(attribute="info.storage.type")
    metadata = _Pairs(attribute="info.metadata")


class _DefaultRequest(Schema):
    URI = fields.String(attribute="request.uri")
    method = fields.String(attribute="request.method")
    remote_addr = fields.String(attribute="request.remote_addr")
    headers = fields.Function(lambda hook: dict(hook.request.headers))


class _V2Request(Schema):
    uri = fields.String(attribute="request.uri")
    method = fields.String(attribute="request.method")
    remote_addr = fields.String(attribute="request.remote_addr")
    headers = fields.Function(lambda hook: dict(hook.request.headers))


class _Default(Schema):
    upload = _Part(_RustusUpload)
    request = _Part(_DefaultRequest)


class _V2(Schema):
    upload = _Part(_RustusUpload)
    request = _Part(_V2Request)


class _TusdStorage(Schema):
    Type = fields.String(attribute="info.storage.type")
    Path = fields.Function(lambda hook: _location(hook))


class _TusdUpload(Schema):
    """rustus' ``TusdFileInfo`` (src/notifiers/message_format.rs)."""

    ID = fields.String(attribute="info.id")
    Offset = fields.Integer(attribute="info.offset")
    Size = fields.Integer(attribute="info.size")
    IsFinal = fields.Boolean(attribute="info.is_final")
    IsPartial = fields.Boolean(attribute="info.is_partial")
    PartialUploads = _Parts(attribute="info.partial_uploads")
    SizeIsDeferred = fields.Function(lambda hook: hook.info.size is None)
    MetaData = _Pairs(attribute="info.metadata")
    Storage = _Part(_TusdStorage)


class _TusdRequest(Schema):
    URI = fields.String(attribute="request.uri")
    Method = fields.String(attribute="request.method")
    RemoteAddr = fields.String(attribute="request.remote_addr")
    Header = fields.Function(
        lambda hook: {name: [value] for name, value in hook.request.headers.items()}
    )


class _Tusd(Schema):
    Upload = _Part(_TusdUpload)
    HTTPRequest = _Part(_TusdRequest)


class _TusdV2Upload(Schema):
    """tusd's ``FileInfo`` as Go encodes it (pkg/handler/datastore.go).

    Its numbers and strings cannot be null: a deferred size is 0, and the id is empty before the
    upload is created.
    """

    ID = fields.Function(lambda hook: "" if _is_unborn(hook) else hook.info.id)
    Size = fields.Function(lambda hook: hook.info.size or 0)
    SizeIsDeferred = fields.Function(lambda hook: hook.info.size is None)
    Offset = fields.Integer(attribute="info.offset")
    MetaData = _Pairs(attribute="info.metadata")
    IsPartial = fields.Boolean(attribute="info.is_partial")
    IsFinal = fields.Boolean(attribute="info.is_final")
    PartialUploads = _Parts(attribute="info.partial_uploads")
    Storage = fields.Function(lambda hook: _tusd_storage(hook))


class _TusdV2Request(Schema):
    Method = fields.String(attribute="request.method")
    URI = fields.String(attribute="request.uri")
    RemoteAddr = fields.Function(lambda hook: _host_and_port(hook))
    Header = fields.Function(
        lambda hook: {
            _canonical(name): list(values) for name, values in hook.request.fields.items()
        }
    )


class _TusdV2Event(Schema):
    Upload = _Part(_TusdV2Upload)
    HTTPRequest = _Part(_TusdV2Request)


class _TusdV2(Schema):
    Type = fields.String(attribute="type.value")
    Event = _Part(_TusdV2Event)


def _is_unborn(hook: HookRequest) -> bool:
    return hook.type is HookType.PRE_CREATE


def _tusd_storage(hook: HookRequest) -> dict[str, str] | None:
    """Return tusd's ``Storage``, without ``InfoPath``: our records are not such files."""
    storage = hook.info.storage
    if _is_unborn(hook) or not storage.type:
        return None
    shown = {"Type": _TUSD_STORES.get(storage.type, storage.type)}
    path = _location(hook)
    # All values are strings, because those of the gRPC message are.
    return shown if path is None else {**shown, "Path": path}


def _location(hook: HookRequest) -> str | None:
    """Return the path; bytes that are not UTF-8 are replaced."""
    path = hook.location
    return None if path is None else path.encode("utf-8", "replace").decode()


def _host_and_port(hook: HookRequest) -> str:
    """Return the client's address as Go writes it: ``192.0.2.1:443``, ``[::1]:443``."""
    address = hook.request.remote_addr
    port = hook.request.remote_port
    if address is None or port is None:
        return address or ""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _canonical(name: str) -> str:
    """Return a header's name as Go's ``CanonicalHeaderKey`` does, e.g. ``Content-Md5``."""
    return "-".join(word.capitalize() for word in name.split("-"))


class PayloadFormat:
    """A format of payloads.

    :ivar follows_tusd: whether hooks behave as in tusd 2, not as in rustus.
    """

    def __init__(self, name: FormatName, schema: Schema) -> None:
        self.name = name
        self.follows_tusd = name is FormatName.TUSD_V2
        self._schema = schema

    def dump(self, request: HookRequest) -> dict[str, Any]:
        """Return a hook as JSON values."""
        payload: dict[str, Any] = self._schema.dump(request)
        return payload

    def encode(self, request: HookRequest) -> str:
        """Return a hook as one line of JSON that can be encoded as UTF-8."""
        return _encoder.encode(self.dump(request)).encode("utf-8", "replace").decode()


_FORMATS = {
    name: PayloadFormat(name, schema)
    for name, schema in (
        (FormatName.DEFAULT, _Default()),
        (FormatName.V2, _V2()),
        (FormatName.TUSD, _Tusd()),
        (FormatName.TUSD_V2, _TusdV2()),
    )
}


def payload_format(name: FormatName) -> PayloadFormat:
    """Return a format by its name."""
    return _FORMATS[name]


class _Flag(fields.Boolean):
    """``true`` or ``false``, but none of marshmallow's other truthy and falsy values."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class _Text(fields.String):
    """Text that can be encoded as UTF-8; Go's empty string means "unset", as null does."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        text = super()._deserialize(value, attr, data, **kwargs)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self.make_error("invalid_utf8") from None
        return text or None


class _Headers(fields.Field[dict[str, str]]):
    """Header fields: a value is a string, or a list of strings to join with commas."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValidationError("Not an object.")
        headers = {}
        for name, texts in value.items():
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValidationError(f"{name}: not a string or a list of strings.")
            headers[name] = ", ".join(texts).strip(" \t")
        return headers


class _Pairings(fields.Field[Metadata]):
    """Metadata that ``Upload-Metadata`` can carry."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Metadata:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValidationError("Not an object of strings.")
        try:
            metadata = Metadata.of(value)
        except (InvalidMetadata, UnicodeEncodeError) as error:
            raise ValidationError(str(error)) from None
        if list(metadata) != list(value):
            raise ValidationError("A key is empty, or has a space or a comma.")
        return metadata


class _Answer(Schema):
    """A part of an answer. It ignores unknown keys, and the case of keys.

    So does Go's JSON decoder: ``rejectUpload`` must not refuse in tusd and accept here.
    """

    class Meta:
        unknown = EXCLUDE

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = {name.lower(): name for name in self.fields}

    @pre_load
    def _name(self, data: Any, **kwargs: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        named = {self.names.get(key.lower(), key): value for key, value in data.items()}
        # For Go, null is the same as a missing key.
        return {key: value for key, value in named.items() if value is not None}


class _HttpResponse(_Answer):
    StatusCode = fields.Integer(strict=True, load_default=None)
    Body = _Text(load_default=None)
    Header = _Headers(load_default=dict)


class _ChangedStorage(_Answer):
    Path = _Text(load_default=None)


class _Changes(_Answer):
    ID = _Text(load_default=None)
    MetaData = _Pairings(load_default=None)
    Storage = fields.Nested(_ChangedStorage, load_default=dict)

    @post_load
    def _make(self, data: dict[str, Any], **kwargs: Any) -> ChangeFileInfo | None:
        change = ChangeFileInfo(data["ID"], data["MetaData"], data["Storage"].get("Path"))
        return None if change == ChangeFileInfo() else change


class _HookResponse(_Answer):
    """tusd's ``HookResponse`` (pkg/hooks/hooks.go)."""

    HTTPResponse = fields.Nested(_HttpResponse, load_default=dict)
    RejectUpload = _Flag(load_default=False)
    RejectTermination = _Flag(load_default=False)
    ChangeFileInfo = fields.Nested(_Changes, load_default=None)
    StopUpload = _Flag(load_default=False)


_answers = _HookResponse()


def decode_answer(type: HookType, answer: str | bytes) -> HookResponse | None:
    """Parse the answer to a hook.

    :param answer: the text that the application sent back.
    :returns: the answer, ``None`` if the text is not a JSON object with one of tusd's keys.
    :raises BadAnswer: if a known key has a value of the wrong type.
    """
    try:
        data = _parsed(answer)
    except (ValueError, RecursionError):
        return None
    return read_answer(type, data) if isinstance(data, dict) else None


def check_object(answer: str | bytes) -> None:
    """Check that an answer is a JSON object, ``null`` or empty, as tusd 2 does.

    So an HTML page at a wrong URL does not accept uploads.

    :raises BadAnswer: if it is something else.
    """
    try:
        data = _parsed(answer) if answer.strip() else None
    except (ValueError, RecursionError):
        raise BadAnswer("It is not JSON.") from None
    if data is not None and not isinstance(data, dict):
        raise BadAnswer("It is not a JSON object.")


def _parsed(answer: str | bytes) -> Any:
    text = answer if isinstance(answer, str) else answer.decode()
    return json.loads(text.removeprefix("\ufeff"))


def read_answer(type: HookType, data: Mapping[str, Any]) -> HookResponse | None:
    """As ``decode_answer``, for an answer that is already parsed."""
    if not any(key.lower() in _answers.names for key in data):
        return None
    try:
        loaded: dict[str, Any] = _answers.load(data)
    except ValidationError as error:
        raise BadAnswer(str(error)) from None
    response = loaded["HTTPResponse"]
    refusal = "RejectTermination" if type is HookType.PRE_TERMINATE else "RejectUpload"
    return HookResponse(
        reject=type.blocking and loaded[refusal],
        status=response.get("StatusCode") or None,  # 0 is Go's "unset"
        body=response.get("Body"),
        headers=response.get("Header", {}),
        change=loaded["ChangeFileInfo"],
        stop=loaded["StopUpload"],
    )
