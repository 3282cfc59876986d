"""What hooks look like to receivers that were written for rustus and tusd."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from hooks import models
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, State, Storage
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse
from tuswsgi.hooks.payloads import BadAnswer, FormatName, decode_answer, payload_format

STORAGE = Storage("file_storage", "2026/abc")
CREATED = 1658671969.75
INFO = FileInfo("abc", 220, storage=STORAGE, created_at=CREATED)
REQUEST = RequestInfo(
    "PATCH",
    "/files/abc?x=1",
    "192.0.2.7",
    59395,
    {"host": "rustus.localhost", "content-md5": "x", "upload-offset": "0", "x-name": "h\xe9"},
)


def hook(
    info: FileInfo = INFO,
    request: RequestInfo = REQUEST,
    type: HookType = HookType.POST_RECEIVE,
    location: str | None = "/data/2026/abc",
) -> HookRequest:
    return HookRequest(type, info, request, location)


HOOKS = {
    "pre-create": hook(
        INFO.replace(storage=Storage("file_storage")), type=HookType.PRE_CREATE, location=None
    ),
    "nowhere": hook(INFO.replace(storage=Storage()), type=HookType.PRE_CREATE, location=None),
    "receiving": hook(INFO.replace(offset=100)),
    "deferred": hook(INFO.replace(size=None)),
    "empty": hook(INFO.replace(size=0)),
    "partial": hook(INFO.replace(is_partial=True, concat="partial")),
    "final": hook(
        INFO.replace(is_final=True, partial_uploads=("a", "b"), concat="final;/files/a /files/b"),
        type=HookType.POST_FINISH,
    ),
    "finished": hook(
        INFO.replace(offset=220, state=State.FINISHED, finished_at=CREATED),
        type=HookType.POST_FINISH,
    ),
    "terminated": hook(
        INFO.replace(state=State.TERMINATED, deleted_at=CREATED), type=HookType.POST_TERMINATE
    ),
    "metadata": hook(
        INFO.replace(
            metadata=Metadata.of({"filename": "фильм\n.mkv", "raw": b"\xff\xfea", "flag": ""})
        )
    ),
    "ipv6": hook(request=RequestInfo("POST", "/files", "2001:db8::1", 443)),
    "portless": hook(request=RequestInfo("POST", "/files", "192.0.2.7")),
    "addressless": hook(request=RequestInfo("POST", "/files")),
    "unreadable path": hook(location="/data/\udcff"),
    "huge": hook(INFO.replace(size=2**63 - 1, offset=2**63 - 1)),
}

MODELS: dict[FormatName, type[BaseModel]] = {
    FormatName.DEFAULT: models.DefaultHook,
    FormatName.V2: models.V2Hook,
    FormatName.TUSD: models.TusdHook,
    FormatName.TUSD_V2: models.TusdV2Hook,
}

RUSTUS_FORMATS = [FormatName.DEFAULT, FormatName.V2, FormatName.TUSD]

#: What rustus sends as null, although its schemas do not say so.
NULLABLE = {
    *("path", "parts", "remote_addr", "length"),
    *("Path", "PartialUploads", "RemoteAddr", "Size"),
}

formats = jsonschema.FormatChecker(formats=())


@formats.checks("ipvanyaddress", raises=ValueError)
def _is_address(value: object) -> bool:
    return value is None or bool(ip_address(str(value)))


def sent(name: FormatName, request: HookRequest) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(payload_format(name).encode(request))
    return payload


def schema(name: FormatName) -> dict[str, Any]:
    """Return the schema of rustus' documentation; nothing but its fields may come."""
    read: dict[str, Any] = json.loads(
        (Path(__file__).parent / "schemas" / f"{name.value}.json").read_text()
    )
    for definition in (read, *read["definitions"].values()):
        definition["additionalProperties"] = False
        for field in NULLABLE & set(definition["properties"]):
            properties = definition["properties"][field]
            properties["type"] = [properties["type"], "null"]
    return read


@pytest.mark.parametrize("state", HOOKS)
@pytest.mark.parametrize("name", RUSTUS_FORMATS)
def test_rustus_schemas_hold(name: FormatName, state: str) -> None:
    validator = jsonschema.Draft7Validator(schema(name), format_checker=formats)
    validator.validate(sent(name, HOOKS[state]))


@pytest.mark.parametrize("name", RUSTUS_FORMATS)
def test_the_schemas_see_mistakes(name: FormatName) -> None:
    validator = jsonschema.Draft7Validator(schema(name), format_checker=formats)
    payload = sent(name, HOOKS["receiving"])
    upload = payload["Upload" if name is FormatName.TUSD else "upload"]
    request = payload["HTTPRequest" if name is FormatName.TUSD else "request"]
    upload["extra"] = 1
    request["RemoteAddr" if name is FormatName.TUSD else "remote_addr"] = "192.0.2.7:1"
    assert len(list(validator.iter_errors(payload))) == 2


@pytest.mark.parametrize("state", HOOKS)
@pytest.mark.parametrize("name", FormatName)
def test_models_of_receivers_read_it(name: FormatName, state: str) -> None:
    MODELS[name].model_validate_json(payload_format(name).encode(HOOKS[state]))


@pytest.mark.parametrize("name", RUSTUS_FORMATS)
def test_fields_come_in_the_order_of_rustus_examples(name: FormatName) -> None:
    parts = [*MODELS[name].model_fields.items()]
    payload = sent(name, HOOKS["final"])
    assert list(payload) == [key for key, _ in parts]
    for key, field in parts:
        assert isinstance(field.annotation, type)
        assert list(payload[key]) == list(field.annotation.model_fields)


def test_a_model_gets_the_time() -> None:
    read = models.DefaultHook.model_validate(sent(FormatName.DEFAULT, HOOKS["receiving"]))
    assert read.upload.created_at == datetime.fromtimestamp(int(CREATED), timezone.utc)


UPLOAD = {
    "id": "abc",
    "offset": 0,
    "length": 220,
    "path": "/data/2026/abc",
    "created_at": 1658671969,
    "deferred_size": False,
    "is_partial": False,
    "is_final": False,
    "parts": None,
    "storage": "file_storage",
    "metadata": {"filename": "ф\ufffd", "flag": ""},
}
GOLDEN: dict[FormatName, Any] = {
    FormatName.DEFAULT: {
        "upload": UPLOAD,
        "request": {
            "URI": "/files/abc?x=1",
            "method": "PATCH",
            "remote_addr": "192.0.2.7",
            "headers": dict(REQUEST.headers),
        },
    },
    FormatName.V2: {
        "upload": UPLOAD,
        "request": {
            "uri": "/files/abc?x=1",
            "method": "PATCH",
            "remote_addr": "192.0.2.7",
            "headers": dict(REQUEST.headers),
        },
    },
    FormatName.TUSD: {
        "Upload": {
            "ID": "abc",
            "Offset": 0,
            "Size": 220,
            "IsFinal": False,
            "IsPartial": False,
            "PartialUploads": None,
            "SizeIsDeferred": False,
            "MetaData": {"filename": "ф\ufffd", "flag": ""},
            "Storage": {"Type": "file_storage", "Path": "/data/2026/abc"},
        },
        "HTTPRequest": {
            "URI": "/files/abc?x=1",
            "Method": "PATCH",
            "RemoteAddr": "192.0.2.7",
            "Header": {
                "host": ["rustus.localhost"],
                "content-md5": ["x"],
                "upload-offset": ["0"],
                "x-name": ["h\xe9"],
            },
        },
    },
    FormatName.TUSD_V2: {
        "Type": "post-receive",
        "Event": {
            "Upload": {
                "ID": "abc",
                "Size": 220,
                "SizeIsDeferred": False,
                "Offset": 0,
                "MetaData": {"filename": "ф\ufffd", "flag": ""},
                "IsPartial": False,
                "IsFinal": False,
                "PartialUploads": None,
                "Storage": {"Type": "filestore", "Path": "/data/2026/abc"},
            },
            "HTTPRequest": {
                "Method": "PATCH",
                "URI": "/files/abc?x=1",
                "RemoteAddr": "192.0.2.7:59395",
                "Header": {
                    "Host": ["rustus.localhost"],
                    "Content-Md5": ["x"],
                    "Upload-Offset": ["0"],
                    "X-Name": ["h\xe9"],
                },
            },
        },
    },
}


@pytest.mark.parametrize("name", FormatName)
def test_the_whole_payload(name: FormatName) -> None:
    metadata = Metadata.of({"filename": "ф".encode() + b"\xff", "flag": b""})
    payload = payload_format(name).encode(hook(INFO.replace(metadata=metadata)))
    expected = json.dumps(GOLDEN[name], separators=(",", ":"), ensure_ascii=False)
    assert payload == expected


def test_a_header_that_came_twice_has_two_values_for_tusd_and_one_for_rustus() -> None:
    headers = {"x-tag": "a,b", "cookie": "c=1; d=2"}
    repeated = {"x-tag": ("a", "b"), "cookie": ("c=1", "d=2")}
    told = hook(request=replace(REQUEST, headers=headers, repeated=repeated))
    header = sent(FormatName.TUSD_V2, told)["Event"]["HTTPRequest"]["Header"]
    assert header == {"X-Tag": ["a", "b"], "Cookie": ["c=1", "d=2"]}
    assert sent(FormatName.DEFAULT, told)["request"]["headers"] == headers
    assert sent(FormatName.TUSD, told)["HTTPRequest"]["Header"] == {
        "x-tag": ["a,b"],
        "cookie": ["c=1; d=2"],
    }


@pytest.mark.parametrize("name", FormatName)
def test_a_payload_can_be_sent_whatever_clients_say(name: FormatName) -> None:
    evil = "\x00\x1b[2J\x9b\xa0\u2028\udc80\ud800"
    headers = {"x-name": evil, "authorization": evil}
    payload = sent(name, hook(request=replace(REQUEST, uri=f"/{evil}", headers=headers)))
    json.dumps(payload, ensure_ascii=False).encode()


def test_tusd_v2_before_the_creation() -> None:
    payload = sent(FormatName.TUSD_V2, HOOKS["pre-create"])
    upload = payload["Event"]["Upload"]
    assert payload["Type"] == "pre-create"
    assert (upload["ID"], upload["Storage"], upload["MetaData"]) == ("", None, {})


def test_rustus_formats_before_the_creation() -> None:
    upload = sent(FormatName.DEFAULT, HOOKS["pre-create"])["upload"]
    assert (upload["id"], upload["path"], upload["storage"]) == ("abc", None, "file_storage")


def test_a_deferred_length() -> None:
    request = HOOKS["deferred"]
    assert sent(FormatName.V2, request)["upload"]["length"] is None
    assert sent(FormatName.V2, request)["upload"]["deferred_size"] is True
    assert sent(FormatName.TUSD, request)["Upload"]["Size"] is None
    # tusd's size is an integer of Go.
    upload = sent(FormatName.TUSD_V2, request)["Event"]["Upload"]
    assert (upload["Size"], upload["SizeIsDeferred"]) == (0, True)


def test_parts_of_a_final_upload() -> None:
    request = HOOKS["final"]
    assert sent(FormatName.V2, request)["upload"]["parts"] == ["a", "b"]
    assert sent(FormatName.TUSD_V2, request)["Event"]["Upload"]["PartialUploads"] == ["a", "b"]


@pytest.mark.parametrize(
    ("state", "plain", "with_port"),
    [
        ("ipv6", "2001:db8::1", "[2001:db8::1]:443"),
        ("portless", "192.0.2.7", "192.0.2.7"),
        ("addressless", None, ""),
    ],
)
def test_the_clients_address(state: str, plain: str | None, with_port: str) -> None:
    assert sent(FormatName.DEFAULT, HOOKS[state])["request"]["remote_addr"] == plain
    assert sent(FormatName.TUSD, HOOKS[state])["HTTPRequest"]["RemoteAddr"] == plain
    assert sent(FormatName.TUSD_V2, HOOKS[state])["Event"]["HTTPRequest"]["RemoteAddr"] == with_port


def test_only_todays_tusd_is_followed_as_such() -> None:
    assert [name for name in FormatName if payload_format(name).follows_tusd] == [
        FormatName.TUSD_V2
    ]


@pytest.mark.parametrize(
    "answer",
    [
        *("", " ", "ok", "null", "true", "0", "[]", '"RejectUpload"', '[{"RejectUpload": true}]'),
        *("{", "{}", '{"detail": "fine"}', '{"RejectUpload": true', '{"upload": {"ID": 3}}'),
        *(b"\xff\xfe{", b"{\x00}", "[" * 100_000, '{"a": ' * 100_000),
    ],
    ids=lambda answer: repr(answer[:20]),
)
def test_what_says_nothing(answer: str | bytes) -> None:
    assert decode_answer(HookType.PRE_CREATE, answer) is None


def test_everything_that_can_be_said() -> None:
    answer = {
        "HTTPResponse": {
            "StatusCode": 403,
            "Body": '{"message": "nö"}',
            "Header": {"Content-Type": "application/json", "X-Many": ["a", "b"]},
        },
        "RejectUpload": True,
        "RejectTermination": False,
        "StopUpload": True,
        "ChangeFileInfo": {
            "ID": "mine",
            "MetaData": {"filename": "é", "flag": ""},
            "Storage": {"Path": "a/b", "Type": "ignored"},
            "Size": 5,
        },
        "Unknown": {"a": 1},
    }
    assert decode_answer(HookType.PRE_CREATE, json.dumps(answer).encode()) == HookResponse(
        reject=True,
        status=403,
        body='{"message": "nö"}',
        headers={"Content-Type": "application/json", "X-Many": "a, b"},
        change=ChangeFileInfo("mine", Metadata.of({"filename": "é", "flag": ""}), "a/b"),
        stop=True,
    )


@pytest.mark.parametrize(
    ("type", "answer", "rejects"),
    [
        (HookType.PRE_CREATE, '{"RejectUpload": true}', True),
        (HookType.PRE_FINISH, '{"RejectUpload": true}', True),
        (HookType.PRE_GET, '{"RejectUpload": true}', True),
        (HookType.PRE_CREATE, '{"RejectTermination": true}', False),
        (HookType.PRE_TERMINATE, '{"RejectTermination": true}', True),
        (HookType.PRE_TERMINATE, '{"RejectUpload": true}', False),
        (HookType.POST_FINISH, '{"RejectUpload": true}', False),
        # As in Go, whose JSON does not look at the case of letters.
        (HookType.PRE_CREATE, '{"rejectUpload": true}', True),
        (HookType.PRE_CREATE, '\ufeff{"RejectUpload": true}', True),
    ],
)
def test_refusals(type: HookType, answer: str, rejects: bool) -> None:
    read = decode_answer(type, answer)
    assert read is not None
    assert read.reject is rejects


def test_what_go_writes_for_nothing() -> None:
    answer = (
        '{"HTTPResponse": {"StatusCode": 0, "Body": "", "Header": null}, "RejectUpload": false,'
        ' "RejectTermination": false, "StopUpload": false,'
        ' "ChangeFileInfo": {"ID": "", "MetaData": null, "Storage": null}}'
    )
    assert decode_answer(HookType.PRE_CREATE, answer) == HookResponse()


def test_metadata_may_become_empty() -> None:
    read = decode_answer(HookType.PRE_CREATE, '{"ChangeFileInfo": {"MetaData": {}}}')
    assert read is not None
    assert read.change == ChangeFileInfo(metadata=Metadata())


@pytest.mark.parametrize(
    "answer",
    [
        '{"RejectUpload": "true"}',
        '{"RejectUpload": 1}',
        '{"RejectTermination": []}',
        '{"StopUpload": "yes"}',
        '{"HTTPResponse": 403}',
        '{"HTTPResponse": {"StatusCode": "403"}}',
        '{"HTTPResponse": {"StatusCode": 403.0}}',
        '{"HTTPResponse": {"StatusCode": true}}',
        '{"HTTPResponse": {"Body": {"a": 1}}}',
        '{"HTTPResponse": {"Body": "\\ud800"}}',
        '{"HTTPResponse": {"Header": []}}',
        '{"HTTPResponse": {"Header": {"A": 1}}}',
        '{"HTTPResponse": {"Header": {"A": ["a", 1]}}}',
        '{"ChangeFileInfo": "id"}',
        '{"ChangeFileInfo": {"ID": 5}}',
        '{"ChangeFileInfo": {"MetaData": ["a"]}}',
        '{"ChangeFileInfo": {"MetaData": {"a": 1}}}',
        '{"ChangeFileInfo": {"MetaData": {"a b": "c"}}}',
        '{"ChangeFileInfo": {"MetaData": {"a,b": "c"}}}',
        '{"ChangeFileInfo": {"MetaData": {"": "c"}}}',
        '{"ChangeFileInfo": {"MetaData": {"é": "c"}}}',
        '{"ChangeFileInfo": {"MetaData": {"a": "\\udfff"}}}',
        '{"ChangeFileInfo": {"Storage": "path"}}',
        '{"ChangeFileInfo": {"Storage": {"Path": 1}}}',
    ],
)
def test_a_known_key_of_a_wrong_type(answer: str) -> None:
    with pytest.raises(BadAnswer):
        decode_answer(HookType.PRE_CREATE, answer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def objects(*keys: str, **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return objects with some of these keys, and with values of any kind."""
    known = dict.fromkeys(keys, json_values) | {
        key: value | json_values for key, value in parts.items()
    }
    return st.fixed_dictionaries({}, optional=known)


answers = objects(
    "RejectUpload",
    "RejectTermination",
    "StopUpload",
    HTTPResponse=objects("StatusCode", "Body", Header=st.dictionaries(st.text(), json_values)),
    ChangeFileInfo=objects(
        "ID", MetaData=st.dictionaries(st.text(), st.text()), Storage=objects("Path")
    ),
)


@given(st.sampled_from(HookType), st.binary() | st.text() | answers.map(json.dumps))
def test_an_answer_is_understood_or_refused(type: HookType, answer: str | bytes) -> None:
    try:
        read = decode_answer(type, answer)
    except BadAnswer:
        return
    assert read is None or isinstance(read, HookResponse)
    if read is not None:
        (read.body or "").encode()
        if read.change is not None and read.change.metadata is not None:
            assert Metadata.parse(read.change.metadata.raw) == read.change.metadata
