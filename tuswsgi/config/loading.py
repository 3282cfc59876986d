"""The configuration: the value of each option, and where it comes from.

``Config.load`` merges flags, the environment and an INI file, validates them and reports all
mistakes at once. The options themselves are declared beside the code that they set.
"""

from __future__ import annotations

import configparser
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from marshmallow import Schema, ValidationError

from tuswsgi.config.groups import option_groups
from tuswsgi.config.variables import is_of_kubernetes, unread
from tuswsgi.core.display import MASK, without_secrets
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.options import Option, options_of

G = TypeVar("G")

#: The source of values that were not set.
DEFAULT = "default"

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Given:
    """A value as it was written, and where."""

    value: Any
    source: str


class Config:
    """The values of all options.

    :ivar warnings: sentences about environment variables that were probably meant as options.
    """

    def __init__(
        self, values: Mapping[str, Any], sources: Mapping[str, str], warnings: Sequence[str] = ()
    ) -> None:
        self.warnings = warnings
        self._values = values
        self._sources = sources

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environ: Mapping[str, str] = _EMPTY,
        flags: Mapping[str, Any] = _EMPTY,
        keywords: Mapping[str, Any] = _EMPTY,
    ) -> Config:
        """Return the configuration from flags, the environment and a file, in this precedence.

        An empty text unsets an option that may be unset.

        :param file: an INI file.
        :param environ: the environment, where the variable of an option with ``_FILE`` appended
            names a file that holds the value.
        :param flags: values by ``Option.key``, as text or as parsed values.
        :param keywords: likewise, in a Python call: messages name the keyword and not the flag.
        :raises ConfigurationError: with one line for each mistake.
        """
        options = {option.key: option for option in all_options()}
        names = {name for option in options.values() for name in option.variables}
        warnings = tuple(unread(environ, names))
        environ = {
            name: value for name, value in environ.items() if not is_of_kubernetes(name, value)
        }
        problems: list[str] = []
        given = {
            **_from_file(file, options.values(), problems),
            **_from_environ(environ, options.values(), names, problems),
            **_from_flags(flags, options, problems),
            **_from_keywords(keywords, options, problems),
        }
        values = _convert(given, options, problems)
        config = cls(values, {key: one.source for key, one in given.items()}, warnings)
        problems += _contradictions(config)
        if problems:
            raise ConfigurationError("\n".join(problems))
        return config

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Config:
        """Return the configuration from the environment and the file that ``TUSWSGI_CONFIG`` names.

        :raises ConfigurationError: with one line for each mistake.
        """
        file = environ.get("TUSWSGI_CONFIG")
        return cls.load(Path(file) if file else None, environ)

    def values(self, group: type) -> dict[str, Any]:
        """Return the values of a group's options by their names, to call it with."""
        return {option.name: self._values[option.key] for option in options_of(group)}

    def build(self, group: type[G]) -> G:
        """Return an instance of `group` with its configured values."""
        return group(**self.values(group))

    def make(self, kind: type[G], **values: Any) -> G:
        """Return an instance of a class, with the options that its constructor takes by name.

        The options that the class declares win over those of the section ``tuswsgi``, of which
        unset ones are left to the constructor's defaults.

        :param values: more values, which win over options. Names that the constructor does not
            take are ignored.
        """
        common = {key: value for key, value in self._values.items() if value is not None}
        own = self.values(kind) if is_dataclass(kind) else {}
        known = {**common, **own, **values}
        names = signature(kind).parameters
        return kind(**{name: known[name] for name in names if name in known})

    def __getitem__(self, key: str) -> Any:
        """Return the value of an option by its ``key``."""
        return self._values[key]

    def value(self, option: Option) -> Any:
        """Return the value of one option."""
        return self._values[option.key]

    def replace(self, key: str, value: Any, source: str) -> Config:
        """Return a copy with another value for the option with this ``key``."""
        values = {**self._values, key: value}
        return Config(values, {**self._sources, key: source}, self.warnings)

    def source(self, option: Option) -> str:
        """Return where a value comes from: a flag, a variable, a file or ``DEFAULT``."""
        return self._sources.get(option.key, DEFAULT)


def all_options() -> Iterator[Option]:
    """Yield every option of the server, group by group."""
    for group in option_groups():
        yield from options_of(group)


def _from_file(
    file: Path | None, options: Iterable[Option], problems: list[str]
) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    if file is None:
        return given
    known: dict[str, dict[str, Option]] = {}
    for option in options:
        known.setdefault(option.section, {})[option.name] = option
    for section, keys in _read_ini(file, problems).items():
        if section not in known:
            problems.append(f"{file}: there is no section [{section}]{_hint(section, known)}.")
            continue
        for key, value in keys.items():
            if key in known[section]:
                given[known[section][key].key] = _Given(value, str(file))
            else:
                hint = _hint(key, known[section])
                problems.append(f"{file}: there is no key {key} in [{section}]{hint}.")
    return given


def _read_ini(file: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    # DSNs contain %, so there is no interpolation. No section has defaults for all others.
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(file.read_text("utf-8-sig"), str(file))
    except OSError as error:
        problems.append(f"{file}: the file cannot be read: {error.strerror}.")
    except UnicodeDecodeError:
        problems.append(f"{file}: the file is not UTF-8 text.")
    except configparser.Error as error:
        problems.append(f"{file}: {' '.join(error.message.split())}.")
    else:
        return {section: dict(parser[section]) for section in parser.sections()}
    return {}


def _from_environ(
    environ: Mapping[str, str], options: Iterable[Option], names: Set[str], problems: list[str]
) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for option in options:
        for name in option.variables:
            by_file = f"{name}_FILE"
            if name in environ:
                given[option.key] = _Given(environ[name], name)
            # RUSTUS_HOOKS_FILE is an option of its own, not a file with RUSTUS_HOOKS.
            elif environ.get(by_file) and by_file not in names:
                try:
                    text = Path(environ[by_file]).read_text("utf-8").strip()
                except (OSError, ValueError):
                    problems.append(f"{by_file}: the file {environ[by_file]} cannot be read.")
                    break
                given[option.key] = _Given(text, by_file)
            else:
                continue
            break
    return given


def _from_flags(
    flags: Mapping[str, Any], options: Mapping[str, Option], problems: list[str]
) -> dict[str, _Given]:
    given = {}
    for key, value in flags.items():
        if key in options:
            given[key] = _Given(value, options[key].flags[0])
        else:
            problems.append(f"There is no option {key}{_hint(key, options)}.")
    return given


def _from_keywords(
    keywords: Mapping[str, Any], options: Mapping[str, Option], problems: list[str]
) -> dict[str, _Given]:
    given = _from_flags(keywords, options, problems)
    return {key: _Given(one.value, f"the keyword {key}") for key, one in given.items()}


def _convert(
    given: Mapping[str, _Given], options: Mapping[str, Option], problems: list[str]
) -> dict[str, Any]:
    fields = {key: option.field for key, option in options.items()}
    schema = Schema.from_dict(fields, name="Configuration")()
    texts = {
        key: None if one.value == "" and options[key].field.allow_none else one.value
        for key, one in given.items()
    }
    values = {key: option.default for key, option in options.items()}
    try:
        values.update(schema.load(texts))
    except ValidationError as error:
        for key, messages in error.messages_dict.items():
            problems.append(_complaint(options[key], given[key], messages))
    return values


def _complaint(option: Option, given: _Given, messages: Iterable[str]) -> str:
    value = MASK if option.secret else f"{given.value!s}"
    setting = f"[{option.section}] {option.name} = {value} (from {given.source})"
    return without_secrets(f"{setting}: {' '.join(messages)}")


def _contradictions(config: Config) -> Iterator[str]:
    """Yield the problems of options that are valid by themselves but not together."""
    for group in option_groups():
        if hasattr(group, "contradictions"):
            yield from config.build(group).contradictions()


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}" if close else ""
