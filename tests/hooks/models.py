"""The models with which receivers of hooks read them: the formats as types.

Those of rustus' formats are as its documentation gives them, but what it sends as null may
be null; that of tusd's is as tusd's Go types are.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, IPvAnyAddress


class Upload(BaseModel):
    id: str
    offset: int
    length: int | None
    path: str | None
    created_at: datetime
    deferred_size: bool
    is_partial: bool
    is_final: bool
    parts: list[str] | None
    storage: str
    metadata: dict[str, str]


class DefaultRequest(BaseModel):
    URI: str
    method: str
    remote_addr: IPvAnyAddress | None
    headers: dict[str, str]


class V2Request(BaseModel):
    uri: str
    method: str
    remote_addr: IPvAnyAddress | None
    headers: dict[str, str]


class DefaultHook(BaseModel):
    upload: Upload
    request: DefaultRequest


class V2Hook(BaseModel):
    upload: Upload
    request: V2Request


class TusdStorage(BaseModel):
    Type: str
    Path: str | None


class TusdUpload(BaseModel):
    ID: str
    Offset: int
    Size: int | None
    IsFinal: bool
    IsPartial: bool
    PartialUploads: list[str] | None
    SizeIsDeferred: bool
    MetaData: dict[str, str]
    Storage: TusdStorage


class TusdRequest(BaseModel):
    URI: str
    Method: str
    RemoteAddr: IPvAnyAddress | None
    Header: dict[str, list[str]]


class TusdHook(BaseModel):
    Upload: TusdUpload
    HTTPRequest: TusdRequest


class Exact(BaseModel):
    """Takes no other fields and no values of other types, as Go's types do not."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TusdV2Upload(Exact):
    ID: str
    Size: int
    SizeIsDeferred: bool
    Offset: int
    MetaData: dict[str, str]
    IsPartial: bool
    IsFinal: bool
    PartialUploads: list[str] | None
    Storage: dict[str, str] | None


class TusdV2Request(Exact):
    Method: str
    URI: str
    RemoteAddr: str
    Header: dict[str, list[str]]


class TusdV2Event(Exact):
    Upload: TusdV2Upload
    HTTPRequest: TusdV2Request


class TusdV2Hook(Exact):
    Type: str
    Event: TusdV2Event
