"""What browsers are told about the content of an upload."""

from __future__ import annotations

from urllib.parse import unquote

import pytest

from tuswsgi.core.info import FileInfo, Metadata
from tuswsgi.web.downloads import INLINE_TYPES, content_headers, disposition


def headers_of(**metadata: str | bytes) -> dict[str, str]:
    return dict(content_headers(FileInfo(id="a", metadata=Metadata.of(metadata))))


@pytest.mark.parametrize(
    ("name", "plain", "extended"),
    [
        ("file.txt", "file.txt", None),
        ("with space.txt", "with space.txt", None),
        ("semi;colon,comma=.txt", "semi;colon,comma=.txt", None),
        ("it's (1).txt", "it's (1).txt", None),
        ("/etc/passwd", "passwd", None),
        ("C:\\Users\\me\\file.txt", "file.txt", None),
        ("../../up.txt", "up.txt", None),
        ('quo"te.txt', "quo_te.txt", 'quo"te.txt'),
        ("per%20cent.txt", "per_20cent.txt", "per%20cent.txt"),
        ("line\r\nX-Evil: 1.txt", "lineX-Evil: 1.txt", None),
        ("nul\0tab\t.txt", "nultab.txt", None),
        ("кошка.txt", "_____.txt", "кошка.txt"),
        ("漢字.txt", "__.txt", "漢字.txt"),
        ("\N{CAT FACE}.txt", "_.txt", "\N{CAT FACE}.txt"),
        ("naïve €.txt", "na_ve _.txt", "naïve €.txt"),
        ("right\u202eto\u2066left.txt", "righttoleft.txt", None),
        (" trimmed ", "trimmed", None),
    ],
)
def test_names(name: str, plain: str, extended: str | None) -> None:
    text = disposition(Metadata.of({"filename": name}), inline=False)
    assert text.isascii()
    assert text.isprintable()
    kind, _, rest = text.partition("; ")
    assert kind == "attachment"
    if extended is None:
        assert rest == f'filename="{plain}"'
        return
    start, _, encoded = rest.partition("; filename*=UTF-8''")
    assert start == f'filename="{plain}"'
    assert unquote(encoded) == extended
    assert not set(encoded) & set("'\"();,/\\ *")


@pytest.mark.parametrize("name", ["", "/", "a/", "\r\n", " ", "\u200b"])
def test_no_name(name: str) -> None:
    assert disposition(Metadata.of({"filename": name}), inline=False) == "attachment"
    assert disposition(Metadata(), inline=True) == "inline"


def test_bytes_that_are_no_text() -> None:
    text = disposition(Metadata.of({"filename": b"a\xff\xfe.txt"}), inline=False)
    assert text == "attachment; filename=\"a__.txt\"; filename*=UTF-8''a%EF%BF%BD%EF%BF%BD.txt"


def test_other_clients_say_name_and_type() -> None:
    headers = headers_of(name="a.png", type="image/png")
    assert headers["Content-Type"] == "image/png"
    assert headers["Content-Disposition"] == 'inline; filename="a.png"'


@pytest.mark.parametrize("media_type", sorted(INLINE_TYPES))
def test_harmless_types_are_shown(media_type: str) -> None:
    for written in (
        media_type,
        media_type.upper(),
        f"{media_type}; charset=utf-8",
        f'{media_type};a="a=b; A=c"; b=a',
    ):
        headers = headers_of(filename="a", filetype=written)
        assert headers["Content-Type"] == written
        assert headers["Content-Disposition"] == 'inline; filename="a"'
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "media_type",
    [
        "text/html",
        "TEXT/HTML; charset=utf-8",
        "image/svg+xml",
        "application/xhtml+xml",
        "text/xml",
        "application/pdf",
        "application/javascript",
        "application/octet-stream",
        'multipart/mixed; boundary="x y"',
    ],
)
def test_other_types_are_saved(media_type: str) -> None:
    headers = headers_of(filename="a", filetype=media_type)
    assert headers["Content-Type"] == media_type
    assert headers["Content-Disposition"] == 'attachment; filename="a"'
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "text",
        "text/",
        "/html",
        "text/plain/x",
        "text/plain, text/html",
        "text/plain\r\nX-Evil: 1",
        "text/plain;\r\n charset=utf-8",
        "text/plain;\ncharset=utf-8",
        "text/plain; charset=utf-8\r\n;x=y",
        "text/plain\0",
        "text/plain; x",
        'text/plain; x="\r\n"',
        'text/plain; x="\x7f"',
        "text/plain; x=é",
        "téxt/plain",
        "text /plain",
        "text/plain; charset=a; charset=b",
        'image/png;a=b ; A="c;d"',
        'text/plain; x="é"',
        "text/html;text/plain",
        b"\xff\xfe",
    ],
)
def test_what_is_no_type(media_type: str | bytes) -> None:
    headers = headers_of(filename="a", filetype=media_type)
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Disposition"] == 'attachment; filename="a"'
    for value in headers.values():
        assert value.isascii()
        assert value.isprintable()
