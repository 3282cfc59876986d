"""Tables and durations as commands print them."""

from __future__ import annotations

from collections.abc import Sequence

from tuswsgi.core.display import printable


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table, the first one as its head.

    The texts may come from anybody: what a terminal would obey is escaped.
    """
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def span(seconds: float) -> str:
    """Return a duration in its largest fitting unit: ``42s``, ``7m``, ``3h``, ``12d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
