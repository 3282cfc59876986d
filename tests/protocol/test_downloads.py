"""GET: what is given out, how a browser may treat it, ranges and caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.http import http_date

from protocol.client import Client, assert_refused, metadata, path_of
from protocol.conftest import Serve, on_memory
from tuswsgi.app import Tus
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse
from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings

Embed = Callable[..., Tus]

DIGITS = b"0123456789"

#: Sent by a client as a file's name.
NAMES = {
    "plain.txt": b'attachment; filename="plain.txt"',
    "../../etc/passwd": b'attachment; filename="passwd"',
    "C:\\evil\\file.txt": b'attachment; filename="file.txt"',
    'quo"te.txt': b"attachment; filename=\"quo_te.txt\"; filename*=UTF-8''quo%22te.txt",
    "a\r\nSet-Cookie: x=1": b'attachment; filename="aSet-Cookie: x=1"',
    "кошка": b"attachment; filename=\"_____\"; filename*=UTF-8''%D0%BA%D0%BE%D1%88%D0%BA%D0%B0",
    "漢.txt": b"attachment; filename=\"_.txt\"; filename*=UTF-8''%E6%BC%A2.txt",
    "\N{CAT FACE}": b"attachment; filename=\"_\"; filename*=UTF-8''%F0%9F%90%B1",
}


@pytest.fixture
def url(client: Client) -> str:
    return client.create(10, DIGITS)


class TestContent:
    def test_a_finished_upload(self, client: Client, url: str) -> None:
        response = client.get(url)
        assert response.status_code == 200
        assert response.data == DIGITS
        assert response.headers["Content-Length"] == "10"
        assert response.headers["Content-Type"] == "application/octet-stream"
        assert response.headers["Content-Disposition"] == "attachment"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["Tus-Resumable"] == "1.0.0"

    def test_an_empty_upload(self, client: Client) -> None:
        response = client.get(client.create(0))
        assert response.status_code == 200
        assert response.headers["Content-Length"] == "0"

    def test_a_large_upload(self, client: Client) -> None:
        data = bytes(range(256)) * 10_000
        assert client.content(client.create(len(data), data)) == data

    def test_of_a_known_type(self, client: Client) -> None:
        raw = metadata(filename="a.png", filetype="image/png")
        response = client.get(client.create(10, DIGITS, Upload_Metadata=raw))
        assert response.headers["Content-Type"] == "image/png"
        assert response.headers["Content-Disposition"] == 'inline; filename="a.png"'
        assert response.headers["X-Content-Type-Options"] == "nosniff"

    @pytest.mark.parametrize("type", ["text/html", "image/svg+xml", "application/pdf"])
    def test_of_a_type_with_scripts(self, client: Client, type: str) -> None:
        raw = metadata(filename="a", filetype=type)
        response = client.get(client.create(10, DIGITS, Upload_Metadata=raw))
        assert response.headers["Content-Type"] == type
        assert response.headers["Content-Disposition"] == 'attachment; filename="a"'

    @on_memory
    @pytest.mark.parametrize(
        "type",
        [
            "text/html\r\nSet-Cookie: x=1",
            "text/plain;\r\n x=y",
            "text/plain;\n",
            "\r\n\r\n<script>",
            "text/plain\0",
            "text/плохо",
            b"text/\xff",
            "x",
            "",
        ],
    )
    def test_of_a_type_that_is_none(self, client: Client, type: str | bytes) -> None:
        raw = metadata(filename="a", filetype=type)
        response = client.get(client.create(10, DIGITS, Upload_Metadata=raw))
        assert response.status_code == 200
        assert response.headers["Content-Type"] == "application/octet-stream"
        assert response.headers["Content-Disposition"] == 'attachment; filename="a"'
        assert "Set-Cookie" not in response.headers

    @on_memory
    @pytest.mark.parametrize("name", NAMES)
    def test_its_name(self, client: Client, name: str) -> None:
        response = client.get(client.create(10, DIGITS, Upload_Metadata=metadata(filename=name)))
        assert response.headers["Content-Disposition"].encode() == NAMES[name]
        assert "Set-Cookie" not in response.headers

    def test_unfinished_uploads_are_not_there(self, client: Client) -> None:
        for url in (
            client.create(11),
            client.create(11, DIGITS),
            client.create(Upload_Defer_Length=1),
        ):
            assert_refused(client.get(url), 404)

    def test_who_is_not_there(self, client: Client) -> None:
        assert_refused(client.get("/files/unknown"), 404)

    def test_a_file_that_was_moved_away(self, client: Client, url: str) -> None:
        # A post-finish hook may do so.
        uploads = client.tus.uploads
        uploads.data.delete(uploads.infos.load(url.rpartition("/")[2]))
        assert_refused(client.get(url), 410)
        assert client.offset(url) == 10
        client.append(url, b"", 10)
        assert client.delete(url).status_code == 204

    def test_a_file_that_is_too_short(self, serve: Serve, options: dict[str, Any]) -> None:
        client = serve(storage="file-storage")
        url = client.create(10, DIGITS)
        (Path(options["data_dir"]) / url.rpartition("/")[2]).write_bytes(b"012")
        # Only a broken connection tells a client that this is not all.
        with pytest.raises(OSError, match="too soon"):
            client.get(url)

    def test_a_download_goes_on_beside_others(self, client: Client, url: str) -> None:
        opened = [client.tus.uploads.open(info, 0) for info in client.tus.uploads.infos.list()]
        assert client.content(url) == client.content(url) == DIGITS
        assert opened[0].read(3) == b"012"
        for one in opened:
            one.close()


class TestUnfinished:
    def test_they_can_be_served(self, serve: Serve) -> None:
        client = serve(download_unfinished=True)
        url = client.create(20, DIGITS)
        response = client.get(url)
        assert response.status_code == 200
        assert response.data == DIGITS
        assert response.headers["Content-Length"] == "10"
        assert response.headers["Cache-Control"] == "no-store"
        for name in ("ETag", "Last-Modified", "Accept-Ranges"):
            assert name not in response.headers
        # Without a validator nobody could tell whether two ranges belong together.
        assert client.get(url, Range="bytes=0-1").status_code == 200
        client.append(url, DIGITS, 10)
        assert "ETag" in client.get(url).headers
        assert "no-store" not in client.get(url).headers.get("Cache-Control", "")

    def test_final_uploads_that_wait_are_not_there(self, serve: Serve) -> None:
        client = serve(download_unfinished=True)
        final = path_of(client.final(client.part(b"x", 5)))
        assert_refused(client.get(final), 404)

    def test_provisional_bytes_are_not_given_out(self, serve: Serve) -> None:
        client = serve(download_unfinished=True, storage="file-storage")
        url = client.create(20, DIGITS)
        uploads = client.tus.uploads
        info = uploads.infos.load(url.rpartition("/")[2])
        path = Path(uploads.data.location(info) or "")
        path.write_bytes(DIGITS + b"unverified")
        path.with_name(f".{path.name}.unverified").write_text("10\n")
        assert client.content(url) == DIGITS


@on_memory
class TestRanges:
    @pytest.mark.parametrize(
        ("wanted", "start", "stop"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=0-4", 0, 5),
            ("bytes=9-9", 9, 10),
            ("bytes=5-", 5, 10),
            ("bytes=-1", 9, 10),
            ("bytes=-10", 0, 10),
            ("bytes=0-9", 0, 10),
            ("bytes=8-100", 8, 10),
            ("bytes=-100", 0, 10),
            ("bytes=0-18446744073709551616", 0, 10),
            ("Bytes = 2 - 3", 2, 4),
        ],
    )
    def test_a_part(self, client: Client, url: str, wanted: str, start: int, stop: int) -> None:
        response = client.get(url, Range=wanted)
        assert response.status_code == 206
        assert response.data == DIGITS[start:stop]
        assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/10"
        assert response.headers["Content-Length"] == str(stop - start)
        assert "ETag" in response.headers

    @pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=10-20", "bytes=99999999999999999999-"])
    def test_outside(self, client: Client, url: str, wanted: str) -> None:
        response = client.get(url, Range=wanted)
        assert_refused(response, 416, "Range")
        assert response.headers["Content-Range"] == "bytes */10"

    @pytest.mark.parametrize(
        "wanted",
        [
            "bytes=0-1,4-5",
            "bytes=0-1, -1",
            "bytes=5-4",
            "bytes=-0",
            "bytes=",
            "bytes=-",
            "bytes",
            "bytes=a-b",
            "bytes=0-0x5",
            "bytes=+1-2",
            "bytes=1_0-",
            "bytes=\xb2-",
            "chars=0-1",
            "=0-1",
            "",
            ",",
        ],
    )
    def test_what_is_no_single_range(self, client: Client, url: str, wanted: str) -> None:
        # "A server MAY ignore the Range header field" (RFC 9110, 14.2)
        response = client.get(url, environ={"HTTP_RANGE": wanted})
        assert response.status_code == 200
        assert response.data == DIGITS
        assert "Content-Range" not in response.headers

    def test_of_an_empty_upload(self, client: Client) -> None:
        url = client.create(0)
        assert client.get(url, Range="bytes=0-").status_code == 416

    def test_if_range(self, client: Client, url: str) -> None:
        fresh = client.get(url)
        tag, date = fresh.headers["ETag"], fresh.headers["Last-Modified"]
        for condition in (tag, date):
            assert client.get(url, Range="bytes=0-1", If_Range=condition).data == b"01"
        for condition in (
            '"other"',
            f"W/{tag}",
            tag.strip('"'),
            tag.strip('"') + "x",
            http_date(0),
            "Thu, 01 Jan 2099 00:00:00 GMT",
            *NO_DATES,
            "\xe9",
        ):
            response = client.get(url, Range="bytes=0-1", environ={"HTTP_IF_RANGE": condition})
            assert response.status_code == 200, condition
            assert response.data == DIGITS


#: Dates with numbers that no machine counts with, besides ordinary nonsense.
NO_DATES = [
    "nonsense",
    "Fri, 99 Foo 99999 99:99:99 GMT",
    f"Thu, 01 Jan {'9' * 20} 00:00:00 GMT",
    f"Thu, {'9' * 20} Jan 2000 00:00:00 GMT",
    f"Thu, 01 Jan 2000 00:00:00 +{'9' * 20}",
    f"Thu, 01 Jan {'9' * 5000} 00:00:00 GMT",
    "",
]


@on_memory
class TestCaches:
    def test_who_has_it_gets_nothing(self, client: Client, url: str) -> None:
        fresh = client.get(url)
        tag = fresh.headers["ETag"]
        for condition in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            response = client.get(url, If_None_Match=condition)
            assert response.status_code == 304
            assert response.data == b""
            assert response.headers["ETag"] == tag
            assert response.headers["Tus-Resumable"] == "1.0.0"
        assert client.get(url, If_None_Match='"other"').status_code == 200

    def test_dates(self, client: Client, url: str) -> None:
        date = client.get(url).headers["Last-Modified"]
        assert client.get(url, If_Modified_Since=date).status_code == 304
        for other in (http_date(0), *NO_DATES):
            response = client.get(url, environ={"HTTP_IF_MODIFIED_SINCE": other})
            assert response.status_code == 200

    def test_a_tag_stays_as_long_as_the_bytes(self, client: Client, url: str) -> None:
        tags = {client.get(url).headers["ETag"] for _ in range(3)}
        assert len(tags) == 1
        other = client.create(10, DIGITS)
        assert client.get(other).headers["ETag"] not in tags

    def test_an_id_that_is_used_again_has_another_tag(self, app: flask.Flask, embed: Embed) -> None:
        tus = embed()

        @tus.on("pre-create")
        def choose(hook: HookRequest) -> HookResponse:
            return HookResponse(change=ChangeFileInfo(id="today"))

        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        first = client.get(client.create(10, DIGITS))
        client.delete("/files/today")
        clean_up = CleanUp(tus.uploads, CleanUpSettings(tombstone_age=0.0))
        for search in clean_up.searches():
            list(search.removals())
        url = client.create(10, DIGITS[::-1])
        tag = first.headers["ETag"]
        assert client.get(url, If_None_Match=tag).data == DIGITS[::-1]
        assert client.get(url, If_Range=tag, Range="bytes=5-").data == DIGITS[::-1]
        assert_refused(client.get(url, If_Match=tag), 412)

    def test_who_wants_this_version_gets_it(self, client: Client, url: str) -> None:
        fresh = client.get(url)
        tag, date = fresh.headers["ETag"], fresh.headers["Last-Modified"]
        for wanted in (tag, f'"other", {tag}', "*"):
            assert client.get(url, If_Match=wanted).data == DIGITS
        for since in (date, "Thu, 01 Jan 2099 00:00:00 GMT", *NO_DATES):
            response = client.get(url, environ={"HTTP_IF_UNMODIFIED_SINCE": since})
            assert response.data == DIGITS
        # If-Match counts, and the date beside it does not.
        assert client.get(url, If_Match=tag, If_Unmodified_Since=http_date(0)).data == DIGITS
        assert client.get(url, If_Match=tag, If_None_Match=tag).status_code == 304

    def test_who_wants_another_version_is_told(self, client: Client, url: str) -> None:
        tag = client.get(url).headers["ETag"]
        for wanted in ('"other"', f"W/{tag}", "nonsense"):
            assert_refused(client.get(url, If_Match=wanted), 412, "version")
            assert_refused(client.get(url, If_Match=wanted, Range="bytes=0-1"), 412)
        assert_refused(client.get(url, If_Unmodified_Since=http_date(0)), 412)

    def test_of_an_unfinished_upload_nobody_can_want_a_version(self, serve: Serve) -> None:
        client = serve(download_unfinished=True)
        url = client.create(20, DIGITS)
        assert_refused(client.get(url, If_Match='"x"'), 412)
        assert client.get(url, If_Match="*").data == DIGITS
        assert client.get(url, If_Unmodified_Since=http_date(0)).data == DIGITS

    def test_a_part_that_is_not_the_clients_any_more(self, client: Client, url: str) -> None:
        tag = client.get(url).headers["ETag"]
        assert client.get(url, Range="bytes=0-1", If_None_Match=tag).status_code == 304
