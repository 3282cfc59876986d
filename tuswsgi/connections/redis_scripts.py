"""Commands and Lua scripts for Redis."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

#: A command with its arguments; the command is a name or a script.
Command = tuple[Any, ...]


class Script:
    """A Lua script, which Redis runs as a whole or not at all."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def on(self, keys: Sequence[str], *args: Any) -> Command:
        """Return the command that runs it with these ``KEYS`` and ``ARGV``."""
        return (self, len(keys), *keys, *args)
