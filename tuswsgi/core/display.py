"""Escapes untrusted text and hides secrets before text reaches a log or a terminal.

Clients choose file names, other programs write error messages, operators write URLs with
passwords.
"""

from __future__ import annotations

import re

#: Printed instead of a secret.
MASK = "********"

_WORD = re.compile(r"\S+")


def printable(text: str) -> str:
    """Return a text on one line, with escapes such as ``\\x1b`` for characters that are not
    printable: control sequences of terminals, marks of the writing direction.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def without_controls(text: str) -> str:
    """Do as ``printable``, but keep line ends and tabs: for our own text that quotes others'."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text
    )


def without_secrets(text: str) -> str:
    """Return a text with the secrets of URLs masked: everything before an ``@`` and the values of
    queries. It errs on the side of hiding too much.
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
