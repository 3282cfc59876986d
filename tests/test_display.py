"""What of other people's text is shown, and how."""

from __future__ import annotations

import logging
import sys
import unicodedata

import pytest

from tuswsgi.core.display import printable, without_controls, without_secrets
from tuswsgi.observing.logs import LogFormat, formatter

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2028\r\udc80"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2028\r\udc80"


def test_what_a_terminal_obeys_is_escaped() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\n\tb") == r"a\n\tb"
    assert printable("Übung, кошка 🐈.txt") == "Übung, кошка 🐈.txt"


def test_no_control_character_is_left() -> None:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    for shown in (printable(text), without_controls(text)):
        kinds = {unicodedata.category(char) for char in shown if char not in "\n\t"}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("format", LogFormat)
def test_a_line_of_the_log_has_none(format: LogFormat) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("x", 20, "x.py", 1, "%s", (EVIL,), sys.exc_info())
    line = formatter(format).format(record)
    assert "title" in line
    assert all(char.isprintable() or char == "\n" for char in line)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://anna:pw@host/x?token=pw&x=pw&pw", "https://***@host/x?token=***&x=***&***"),
        ("at amqp://:p@w@host, later", "at amqp://***@host, later"),
        ("anna:pw@host:81", "***@host:81"),
        ("https://host:1/x", "https://host:1/x"),
        ("did you mean cors?", "did you mean cors?"),
    ],
)
def test_urls_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown.replace("***", "********")
