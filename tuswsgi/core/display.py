"""Other people's text, as it may be shown in a line of the log or on a terminal.

Clients choose names, programs and servers write errors, operators write URLs with passwords.
This file owns what of that is shown in another way and what is hidden. It shows nothing itself.
"""

from __future__ import annotations

import re

#: What stands for a secret.
MASK = "********"

_WORD = re.compile(r"\S+")


def printable(text: str) -> str:
    """Return a text on one line, with escapes such as ``\\x1b`` for what cannot be printed: what
    a terminal would obey, and what turns the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def without_controls(text: str) -> str:
    """As ``printable``, but line ends and tabs stay: a text of ours, with texts of others in it."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text
    )


def without_secrets(text: str) -> str:
    """Return a text in which URLs have lost their credentials: what stands before an ``@``, and
    the values of their queries. It hides too much rather than too little.
    """
    if "@" not in text and "?" not in text:
        return text
    return _WORD.sub(lambda match: _masked(match[0]), text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _masked(word: str) -> str:
    before, at, rest = word.rpartition("@")
    if at:
        scheme, mark, _ = before.partition("://")
        word = f"{scheme}{mark}{MASK}@{rest}" if mark else f"{MASK}@{rest}"
    address, mark, query = word.partition("?")
    return address + mark + "&".join(map(_masked_pair, query.split("&"))) if query else word


def _masked_pair(pair: str) -> str:
    name, mark, _ = pair.partition("=")
    return f"{name}={MASK}" if mark else MASK
