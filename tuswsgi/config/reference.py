"""The reference of all options, written from their declarations.

It makes the text of ``conf/README.md``, ``conf/tuswsgi.ini`` and ``tuswsgi config show``.
It says nothing that is not declared beside the code, so that it cannot be wrong.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tuswsgi.config.groups import option_groups
from tuswsgi.config.loading import Config
from tuswsgi.core.options import Option, options_of, title

_README = """\
# The configuration of tuswsgi

This page and `tuswsgi.ini` are written by `tuswsgi config docs`.

Each option can be given in four ways. The first one that is there counts:

1. a flag: `tuswsgi serve --port 8080`
2. an environment variable: `TUSWSGI_PORT=8080`
3. a key in an INI file that `-c FILE` or `TUSWSGI_CONFIG` names: `port = 8080`
4. the default

A variable's name with `_FILE` behind it names a file that holds the value, e.g.
`TUSWSGI_INFO_DB_DSN_FILE=/run/secrets/dsn`. An empty value unsets an option that has no
default. Lists are separated by commas (in the INI file also by line ends, and a flag may be
repeated), sizes look like `1048576`, `50MiB` or `5GB`, durations like `20`, `500ms`, `12h`
or `7d`, and switches are `true` or `false` (`--force-fsync` and `--no-force-fsync`).

The flags and variables of rustus work as they are: where a `RUSTUS_` variable is listed, it
is read when ours is not set.

`tuswsgi config check` finds all mistakes, and `tuswsgi config show` says what counts and why.
"""


_HEAD = """\
| Key | Value | Default | What it does | Flag | Variable |
|---|---|---|---|---|---|
"""


def files() -> dict[str, str]:
    """Return the generated files' texts by their names."""
    return {"README.md": _readme(), "tuswsgi.ini": _ini()}


def difference(file: Path, text: str) -> str:
    """Return how `file` differs from what it should be, as a diff; nothing if it does not."""
    present = file.read_text("utf-8") if file.exists() else ""
    lines = difflib.unified_diff(
        present.splitlines(keepends=True),
        text.splitlines(keepends=True),
        f"{file} (as it is)",
        f"{file} (as it should be)",
    )
    return "".join(lines)


def configured(config: Config) -> str:
    """Return the value and the source of each option; secrets are masked, those in URLs too."""
    text = ""
    for section, groups in _sections().items():
        text += f"[{section}]\n"
        for option in (option for group in groups for option in options_of(group)):
            shown = option.show_masked(config.value(option))
            text += f"{option.name} = {shown}".ljust(48) + f"  # {config.source(option)}\n"
    return text


def _sections() -> dict[str, list[type]]:
    sections: dict[str, list[type]] = {}
    for group in option_groups():
        for option in options_of(group):
            sections.setdefault(option.section, [])
            if group not in sections[option.section]:
                sections[option.section].append(group)
    return sections


def _readme() -> str:
    text = _README
    for section, groups in _sections().items():
        text += f"\n## [{section}]\n"
        for group in groups:
            text += f"\n### {title(group)}\n\n"
            text += _HEAD
            text += "".join(f"| {' | '.join(_row(option))} |\n" for option in options_of(group))
    return text


def _row(option: Option) -> Iterator[str]:
    yield f"`{option.name}`"
    yield option.kind.replace("|", ", ")
    default = option.show(option.default)
    yield f"`{default}`" if default else ""
    yield option.help.replace("|", "\\|")
    yield "<br>".join(f"`{flag}`" for flag in option.flags)
    yield "<br>".join(f"`{name}`" for name in option.variables)


def _ini() -> str:
    text = "; Every option of tuswsgi with its default. Written by `tuswsgi config docs`.\n"
    for section, groups in _sections().items():
        text += f"\n[{section}]\n"
        for group in groups:
            text += f"\n; --- {title(group)} ---\n"
            for option in options_of(group):
                text += "\n" + textwrap.fill(
                    option.help, 96, initial_indent="; ", subsequent_indent="; "
                )
                text += f"\n;{option.name} = {option.show(option.default)}".rstrip() + "\n"
    return text
