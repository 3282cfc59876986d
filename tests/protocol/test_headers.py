"""Headers as typed values: numbers, metadata, checksums, and what is wrong with them."""

from __future__ import annotations

import hashlib
import time
import zlib
from base64 import b64encode
from uuid import UUID

import pytest

from tuswsgi.core.errors import (
    BadRequest,
    InvalidChecksum,
    InvalidConcat,
    InvalidContentType,
    InvalidMetadata,
    InvalidUploadDeferLength,
    InvalidUploadLength,
    InvalidUploadOffset,
    UnsupportedTransferCoding,
    UnsupportedVersion,
    UploadNotFound,
)
from tuswsgi.core.info import FileInfo, Metadata, State, check_id, made_at, new_id
from tuswsgi.core.options import KiB
from tuswsgi.transfer.body import content_length
from tuswsgi.transfer.checksum import ALGORITHMS, Checksum
from tuswsgi.web.headers import TusHeaders, describe, final_urls

NO_NUMBERS = [
    "",
    " ",
    " 1",
    "1 ",
    "+1",
    "-1",
    "-0",
    "1_0",
    "1.0",
    "1e3",
    "0x10",
    "1,1",
    "0,0",
    "1, 1",
    "nan",
    "\u0661",  # the Arabic digit one
    "²",
    "\u0661".encode().decode("latin-1"),  # as a WSGI server hands it over
    "1\n",
    "1\0",
    str(2**63),
    str(2**64),
    "9" * 5000,
    "0" * 5000,
    "1" + "0" * 100,
]

NUMBERS = {
    "0": 0,
    "1": 1,
    "007": 7,
    "0" * 100: 0,
    "0" * 100 + "9": 9,
    str(2**31): 2**31,
    str(2**53 + 1): 2**53 + 1,
    str(2**63 - 1): 2**63 - 1,
}


def headers(**values: str) -> TusHeaders:
    return TusHeaders({f"HTTP_{name.upper()}": value for name, value in values.items()})


class TestNumbers:
    @pytest.mark.parametrize(("text", "number"), NUMBERS.items(), ids=lambda value: str(value)[:25])
    def test_numbers(self, text: str, number: int) -> None:
        assert headers(upload_offset=text).offset == number
        assert headers(upload_length=text).length == number
        assert content_length({"CONTENT_LENGTH": text}) == number

    @pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: repr(text)[:25])
    def test_what_is_no_number(self, text: str) -> None:
        with pytest.raises(InvalidUploadOffset, match="The Upload-Offset header is "):
            _ = headers(upload_offset=text).offset
        with pytest.raises(InvalidUploadLength, match="The Upload-Length header is "):
            _ = headers(upload_length=text).length
        if text:
            with pytest.raises(BadRequest, match="The Content-Length header is "):
                content_length({"CONTENT_LENGTH": text})

    def test_a_missing_number(self) -> None:
        assert headers().length is None
        with pytest.raises(InvalidUploadOffset, match="missing"):
            _ = headers().offset
        assert content_length({}) == 0
        assert content_length({"CONTENT_LENGTH": ""}) == 0

    def test_a_chunked_body_has_no_length(self) -> None:
        for coding in ("chunked", "Chunked", " chunked"):
            assert content_length({"HTTP_TRANSFER_ENCODING": coding}) is None
            headers(transfer_encoding=coding).check_transfer_coding()
        headers().check_transfer_coding()

    @pytest.mark.parametrize(
        "coding", ["gzip, chunked", "identity, chunked", "gzip", "chunked, chunked", "x", ""]
    )
    def test_a_body_that_is_coded_in_another_way(self, coding: str) -> None:
        with pytest.raises(UnsupportedTransferCoding, match="chunked"):
            headers(transfer_encoding=coding).check_transfer_coding()


class TestPromisedSize:
    def test_a_length_or_a_deferral(self) -> None:
        assert headers(upload_length="5").promised_size == 5
        assert headers(upload_defer_length="1").promised_size is None

    def test_neither_or_both(self) -> None:
        with pytest.raises(BadRequest, match="missing"):
            _ = headers().promised_size
        with pytest.raises(BadRequest, match="exclude"):
            _ = headers(upload_length="5", upload_defer_length="1").promised_size

    @pytest.mark.parametrize("text", ["0", "2", "true", "", "1,1", "01", "+1", " 1"])
    def test_a_deferral_is_1(self, text: str) -> None:
        with pytest.raises(InvalidUploadDeferLength, match="Upload-Defer-Length"):
            _ = headers(upload_defer_length=text).promised_size


class TestVersion:
    @pytest.mark.parametrize("text", ["", "0.2.2", "1.0", "1.0.0,1.0.0", "1.0.00", "v1.0.0"])
    def test_others(self, text: str) -> None:
        with pytest.raises(UnsupportedVersion):
            headers(tus_resumable=text).check_version()

    def test_none(self) -> None:
        with pytest.raises(UnsupportedVersion):
            headers().check_version()

    def test_ours(self) -> None:
        headers(tus_resumable="1.0.0").check_version()


class TestContentType:
    @pytest.mark.parametrize(
        "text",
        [
            "application/offset+octet-stream",
            "Application/Offset+Octet-Stream",
            "application/offset+octet-stream; charset=utf-8",
            "application/offset+octet-stream ;x",
        ],
    )
    def test_ours(self, text: str) -> None:
        TusHeaders({"CONTENT_TYPE": text}).check_content_type()

    @pytest.mark.parametrize(
        "text", [None, "", "application/octet-stream", "application/offset+octet-stream,x", ";"]
    )
    def test_others(self, text: str | None) -> None:
        with pytest.raises(InvalidContentType):
            TusHeaders({} if text is None else {"CONTENT_TYPE": text}).check_content_type()


class TestMetadata:
    @pytest.mark.parametrize(
        ("raw", "values"),
        [
            ("", {}),
            (" ", {}),
            ("a", {"a": b""}),
            ("a ", {"a": b""}),
            ("a YQ==", {"a": b"a"}),
            ("b Yg==,a YQ==", {"b": b"b", "a": b"a"}),
            ("b Yg==, a YQ== ,\tc", {"b": b"b", "a": b"a", "c": b""}),
            ("a  YQ==", {"a": b"a"}),
            ("A QQ==,a YQ==", {"A": b"A", "a": b"a"}),
            ("raw /wAK", {"raw": b"\xff\x00\n"}),
            (
                "long " + b64encode(bytes(range(256)) * 50).decode(),
                {"long": bytes(range(256)) * 50},
            ),
            ("a!#$%&'*+-.^_`|~(){}[]<>@:;/?=\"\\ eA==", None),
        ],
        ids=lambda value: str(value)[:25],
    )
    def test_pairs(self, raw: str, values: dict[str, bytes] | None) -> None:
        metadata = Metadata.parse(raw)
        assert metadata.raw == raw
        if values is not None:
            assert list(metadata.items()) == list(values.items())

    @pytest.mark.parametrize(
        ("raw", "fault"),
        [
            (",", "empty key"),
            ("a YQ==,", "empty key"),
            (",a YQ==", "empty key"),
            ("a YQ==,,b Yg==", "empty key"),
            ("a YQ==,a Yg==", "repeats the key a"),
            ("a,a", "repeats"),
            ("a YQ", "not Base64"),
            ("a YQ=", "not Base64"),
            ("a YQ===", "not Base64"),
            ("a Y Q==", "not Base64"),
            ("a %%%%", "not Base64"),
            ("a YQ-_", "not Base64"),
            ("a =", "not Base64"),
            ("a é", "not Base64"),
            ("a YQ==\n", "not Base64"),
            ("é YQ==", "not ASCII"),
            ("кошка YQ==", "not ASCII"),
            ("\xd0\xba YQ==", "not ASCII"),
            ("a\tb YQ==", "not ASCII"),
            ("a\x00 YQ==", "not ASCII"),
            ("a\x7f YQ==", "not ASCII"),
        ],
    )
    def test_faults(self, raw: str, fault: str) -> None:
        with pytest.raises(InvalidMetadata, match=f"The Upload-Metadata header.*{fault}"):
            Metadata.parse(raw)

    def test_of_values(self) -> None:
        metadata = Metadata.of({"name": "кошка", "empty": b"", "raw": b"\0\xff"})
        assert metadata.raw == "name 0LrQvtGI0LrQsA==,empty,raw AP8="
        assert metadata.text("name") == "кошка"
        assert metadata.text("raw") == "\0\ufffd"
        assert metadata.text("none") is None
        assert metadata == Metadata(metadata.raw)
        assert hash(metadata) == hash(Metadata(metadata.raw))


class TestConcat:
    def test_the_two_forms(self) -> None:
        assert headers().concat is None
        assert headers(upload_concat="partial").concat == "partial"
        assert headers(upload_concat="final;/a /b").concat == "final;/a /b"
        assert final_urls("final;/a  /b /a", 3) == ["/a", "/b", "/a"]
        assert final_urls("final; /a", 1) == ["/a"]

    @pytest.mark.parametrize("text", ["", "Partial", "partial;", "final", "Final;/a", "x", "0"])
    def test_others(self, text: str) -> None:
        with pytest.raises(InvalidConcat, match="Upload-Concat"):
            _ = headers(upload_concat=text).concat

    @pytest.mark.parametrize("text", ["final;", "final; ", "final;  "])
    def test_no_parts(self, text: str) -> None:
        with pytest.raises(InvalidConcat, match="names no partial upload"):
            final_urls(text, 1000)


class TestChecksum:
    DATA = b"hello world"

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_every_algorithm(self, algorithm: str) -> None:
        if algorithm == "crc32":
            digest = zlib.crc32(self.DATA).to_bytes(4, "big")
        else:
            digest = hashlib.new(algorithm, self.DATA).digest()
        checksum = Checksum.parse(f"{algorithm} {b64encode(digest).decode()}")
        hash = checksum.hash()
        hash.update(self.DATA[:4])
        hash.update(memoryview(self.DATA)[4:])
        assert checksum.matches(hash)
        hash.update(b"!")
        assert not checksum.matches(hash)

    def test_the_example_of_the_specification(self) -> None:
        checksum = Checksum.parse("sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=")
        hash = checksum.hash()
        hash.update(self.DATA)
        assert checksum.matches(hash)

    def test_names_are_lower_case_ascii(self) -> None:
        # "The names of the checksum algorithms MUST only consist of ASCII characters with
        # the modification that uppercase characters are excluded."
        assert list(ALGORITHMS)[:5] == ["sha1", "md5", "crc32", "sha256", "sha512"]
        for name in ALGORITHMS:
            assert name.isascii()
            assert name == name.lower()

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("", "unsupported algorithm"),
            ("sha1", "wrong length"),
            ("sha1 ", "wrong length"),
            ("SHA1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "unsupported algorithm"),
            ("whirlpool Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "unsupported algorithm"),
            ("Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "unsupported algorithm"),
            ("sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0", "not Base64"),
            ("sha1 Kq5sNclPz7QV2-lfQIuc6R7oRu0=", "not Base64"),
            ("sha1 2aae6c35c94fcfb415dbe95f408b9ce91ee846ed", "wrong length"),
            ("sha1 é", "not Base64"),
            ("sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0= x", "not Base64"),
            ("md5 Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "wrong length"),
            ("sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=,sha1 Kq5sNclPz7QV2+lfQIuc6R7oRu0=", "not Base64"),
        ],
    )
    def test_faults(self, text: str, fault: str) -> None:
        with pytest.raises(InvalidChecksum, match=f"The Upload-Checksum header.*{fault}"):
            Checksum.parse(text)

    @pytest.mark.parametrize(
        ("text", "announced"),
        [
            ("Upload-Checksum", True),
            ("upload-checksum", True),
            ("X, Upload-Checksum ,Y", True),
            ("X-Upload-Checksum", False),
            ("", False),
        ],
    )
    def test_an_announced_trailer(self, text: str, announced: bool) -> None:
        assert headers(trailer=text).announces_checksum is announced
        assert headers().announces_checksum is False


class TestDescribe:
    def test_an_unfinished_upload(self) -> None:
        info = FileInfo(id="a", size=9, offset=4, metadata=Metadata("k"), concat="partial")
        assert describe(info, full=False) == [("Upload-Offset", "4")]
        assert describe(info, full=True) == [
            ("Upload-Offset", "4"),
            ("Upload-Length", "9"),
            ("Upload-Metadata", "k"),
            ("Upload-Concat", "partial"),
        ]

    def test_a_deferred_length(self) -> None:
        assert ("Upload-Defer-Length", "1") in describe(FileInfo(id="a"), full=True)

    def test_the_time_of_its_end(self) -> None:
        info = FileInfo(id="a", size=9, expires_at=1403712000.9)
        expires = ("Upload-Expires", "Wed, 25 Jun 2014 16:00:00 GMT")
        assert expires in describe(info, full=False)
        finished = FileInfo(id="a", size=9, expires_at=1403712000.9, finished_at=1.0)
        assert expires not in describe(finished, full=True)

    def test_a_final_upload(self) -> None:
        info = FileInfo(id="a", is_final=True, concat="final;/b", state=State.WAITING)
        assert describe(info, full=True) == [("Upload-Concat", "final;/b")]


class TestIds:
    def test_new_ids_are_long_and_differ(self) -> None:
        ids = {new_id() for _ in range(1000)}
        assert len(ids) == 1000
        for id in ids:
            assert check_id(id) == id

    def test_of_new_ids_nothing_but_the_time_can_be_guessed(self) -> None:
        ids = [new_id() for _ in range(1000)]
        made = [made_at(id) for id in ids]
        assert all(at is not None and abs(at - time.time()) < 60 for at in made)
        numbers = [int(id, 32) for id in ids]
        bits = 5 * len(ids[0])
        # A bit of the time is the same in nearly all of them, a random one in half of them.
        ones = [sum(number >> bit & 1 for number in numbers) for bit in range(bits)]
        assert sum(300 < count < 700 for count in ones) >= 122

    def test_new_ids_sort_by_their_time(self) -> None:
        ids = [new_id()]
        while len({made_at(id) for id in ids}) < 5:
            ids.append(new_id())
        made = [made_at(id) for id in sorted(ids)]
        assert made == sorted(made, key=lambda at: at or 0.0)

    def test_a_thousand_urls_fit_in_a_header(self) -> None:
        url = f"https://example.org/files/{new_id()}"
        assert len("Upload-Concat: final;" + " ".join([url] * 1000)) < 64 * KiB

    @pytest.mark.parametrize(
        "id", ["", "a", "0" * 32, "0" * 37, "w" * 36, "A" * 36, str(UUID(int=7))]
    )
    def test_ids_of_others_tell_no_time(self, id: str) -> None:
        assert made_at(id) is None

    @pytest.mark.parametrize("id", ["a", "-", "_", "a.b", "A~", "0" * 128, "a%62", "10:30@a=b+c"])
    def test_ids(self, id: str) -> None:
        assert check_id(id) == id

    @pytest.mark.parametrize(
        "id",
        [
            "",
            ".",
            "..",
            ".a",
            "~a",
            "a/b",
            "a\\b",
            "a\0",
            "a\n",
            "a b",
            "a&b",
            'a"b',
            "a?b",
            "a#b",
            "a[b",
            "é",
            "к",
            "0" * 129,
        ],
    )
    def test_what_is_no_id(self, id: str) -> None:
        with pytest.raises(UploadNotFound):
            check_id(id)
