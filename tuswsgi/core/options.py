"""Options: how a setting is declared, once, beside the code that obeys it.

A backend or a group of settings is a dataclass whose fields are made with ``option()``.
From that one declaration come the INI key, the environment variable, the command line's
flag, the validation and the row in the reference (``config``, ``cli`` and ``reference``
read it). This file owns the declaration, the kinds of values and the naming rule:

    [s3] part_size = TUSWSGI_S3_PART_SIZE = --s3-part-size = S3DataStore(part_size=...)

The section ``tuswsgi`` adds no prefix: ``[tuswsgi] host`` = ``TUSWSGI_HOST`` = ``--host``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from marshmallow import ValidationError, fields

from tuswsgi.core.display import MASK, without_secrets

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

#: Is called with a value, and raises marshmallow's ``ValidationError``.
Validator = Callable[[Any], Any]

#: The section whose options have no prefix.
MAIN = "tuswsgi"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    # As in dd and in most configuration files: K and KiB are 1,024, KB is 1,000.
    _UNITS |= {
        _letter: 1024**_power,
        f"{_letter}IB": 1024**_power,
        f"{_letter}B": 1000**_power,
    }

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Size(fields.Field[int]):
    """A number of bytes: ``1048576``, ``50MiB``, ``5 GB``."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", str(value).strip(), re.ASCII)
        if match is None or match[2].upper() not in _UNITS:
            raise ValidationError("Not a size such as 1048576, 50MiB or 5GB.")
        # Decimal: a float does not hold all sizes up to 2^63 - 1.
        return int(Decimal(match[1]) * _UNITS[match[2].upper()])

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        for unit, factor in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
            if value and value % factor == 0:
                return f"{value // factor}{unit}"
        return str(value)


class Duration(fields.Field[float]):
    """A time in seconds: ``20``, ``1.5``, ``500ms``, ``12h``, ``7d``."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
            return float(value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(ms|[smhdw]?)", str(value).strip(), re.ASCII)
        if match is None:
            raise ValidationError("Not a duration such as 20, 500ms, 12h or 7d.")
        return float(match[1]) * _SECONDS[match[2] or "s"]

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        for unit in ("d", "h", "m"):
            if value and value % _SECONDS[unit] == 0:
                return f"{value / _SECONDS[unit]:g}{unit}"
        return f"{value:g}s"


class Mode(fields.Field[int]):
    """Permissions in octal digits: ``0640``, ``755``."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> int:
        if isinstance(value, int):
            return value
        if re.fullmatch(r"0?o?[0-7]{3,4}", str(value).strip(), re.ASCII) is None:
            raise ValidationError("Not permissions in octal digits such as 0640.")
        return int(str(value).strip().replace("o", ""), 8)

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return f"{value:04o}"


class Text(fields.String):
    """A string."""


class Switch(fields.Boolean):
    """``true`` or ``false`` (also ``yes``, ``on``, ``1`` and their opposites)."""

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return "true" if value else "false"


class PathName(fields.Field[Path]):
    """A path, relative to the working directory; ``~`` is the home directory."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Path:
        if not str(value):
            raise ValidationError("An empty path.")
        return Path(value).expanduser()

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return str(value)


class Choice(fields.Field[Enum]):
    """One of the values of an enum, in lower or upper case.

    The enum's ``_missing_`` may know more names for its members.
    """

    def __init__(self, enum: type[Enum], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.enum = enum

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(str(member.value) for member in self.enum)

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Enum:
        text = str(value.value if isinstance(value, Enum) else value).strip().lower()
        try:
            return self.enum(text)
        except ValueError:
            raise ValidationError(f"Not one of {', '.join(self.choices)}.") from None

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return str(value.value)


class Items(fields.Field["tuple[Any, ...]"]):
    """A list of values, separated by commas or line ends."""

    def __init__(self, item: fields.Field[Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.item = item

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> tuple[Any, ...]:
        texts = re.split(r"[,\n]", value) if isinstance(value, str) else list(value)
        texts = [text.strip() if isinstance(text, str) else text for text in texts]
        items = []
        messages = []
        for text in texts:
            if text != "":
                try:
                    items.append(self.item.deserialize(text))
                except ValidationError as error:
                    messages += [f"{text}: {message}" for message in error.messages]
        if messages:
            raise ValidationError(messages)
        return tuple(items)

    def _serialize(self, value: Any, attr: Any, obj: Any, **kwargs: Any) -> str:
        return ",".join(map(self.item_text, value))

    def item_text(self, item: Any) -> str:
        """Return one of the values as text."""
        return str(self.item._serialize(item, None, None))


@dataclass(frozen=True)
class Option:
    """One option, as it was declared.

    :param section: the section of the INI file.
    :param name: the key in the section, and the field of the dataclass.
    :param field: turns text into the value and back, and validates it.
    :param rustus: rustus' environment variable without its prefix ``RUSTUS_``.
    :param aliases: more flags that mean this option, without their dashes.
    """

    section: str
    name: str
    default: Any
    help: str
    field: fields.Field[Any]
    rustus: str | None = None
    short: str | None = None
    aliases: tuple[str, ...] = ()
    secret: bool = False

    @property
    def words(self) -> list[str]:
        """The naming rule: the section's words, unless it is the main one, and the key's."""
        prefix = [] if self.section == MAIN else re.split(r"[._]", self.section)
        return prefix + self.name.split("_")

    @property
    def flags(self) -> tuple[str, ...]:
        """The command line's flags, ours first; a switch has ``--no-`` besides."""
        own = "--" + "-".join(self.words)
        short = (f"-{self.short}",) if self.short else ()
        return (own, *short, *(f"--{alias}" for alias in self.aliases))

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables, the one that wins first."""
        own = "TUSWSGI_" + "_".join(self.words).upper()
        if self.rustus is None:
            return (own,)
        as_rustus = f"TUSWSGI_{self.rustus}"
        return (own, *((as_rustus,) if as_rustus != own else ()), f"RUSTUS_{self.rustus}")

    @property
    def key(self) -> str:
        """The name among all options: flags, keyword arguments and messages use it."""
        return "_".join(self.words)

    @property
    def kind(self) -> str:
        """What is to be written: ``size``, ``a|b`` for a choice, ``text,...`` for a list."""
        if isinstance(self.field, Items):
            return f"{_kind(self.field.item)},..."
        return _kind(self.field)

    def show(self, value: Any) -> str:
        """Return a value as it would stand in the INI file; nothing for an unset one."""
        return "" if value is None else str(self.field._serialize(value, self.name, None))

    def show_masked(self, value: Any) -> str:
        """Return a value as an operator may see it: nothing of a secret, and URLs without their
        credentials, whatever the option is.
        """
        if self.secret and value is not None:
            return MASK
        if isinstance(self.field, Items):
            return ",".join(without_secrets(self.field.item_text(item)) for item in value or ())
        return without_secrets(self.show(value))


def option(
    default: Any,
    help: str,
    *,
    kind: Callable[..., fields.Field[Any]] | None = None,
    rustus: str | None = None,
    short: str | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    validate: Validator | Iterable[Validator] | None = None,
) -> Any:
    """Declare an option: a dataclass field with all that is to be known about it.

    :param default: the value of an option that nobody set; ``None`` for "unset".
    :param help: one or two sentences for the reference and ``--help``.
    :param kind: ``Size`` or ``Duration`` where the type does not say it.
    :param rustus: rustus' environment variable without its prefix ``RUSTUS_``.
    :param short: the letter of a short flag.
    :param aliases: more flags that mean this option, without their dashes.
    :param secret: never to be shown. What URLs hold of secrets is hidden in any case.
    :param validate: one or more of ``marshmallow.validate``, or functions like these.
    """
    declared = {
        "help": help,
        "kind": kind,
        "rustus": rustus,
        "short": short,
        "aliases": aliases,
        "secret": secret,
        "validate": validate,
    }
    return dataclasses.field(default=default, repr=not secret, metadata={"option": declared})


def options_of(group: type) -> Iterator[Option]:
    """Yield the options that a dataclass declares, in their order.

    The class says its section in ``section`` (``MAIN`` if it does not).
    """
    section = getattr(group, "section", MAIN)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        declared: Mapping[str, Any] | None = field.metadata.get("option")
        if declared is None:
            continue
        default = None if field.default is MISSING else field.default
        kind = _field_for(hints[field.name], declared["kind"], declared["validate"])
        # An option without a default may be unset, also where the class, which gets one
        # from the registry, says otherwise.
        kind.allow_none = kind.allow_none or default is None
        yield Option(
            section=section,
            name=field.name,
            default=default,
            help=declared["help"],
            field=kind,
            rustus=declared["rustus"],
            short=declared["short"],
            aliases=declared["aliases"],
            secret=declared["secret"],
        )


def title(group: type) -> str:
    """Return what a group of options is about: the first line of its documentation."""
    return (group.__doc__ or group.__name__).partition("\n")[0].rstrip(".")


def _kind(field: fields.Field[Any]) -> str:
    if isinstance(field, Choice):
        return "|".join(field.choices)
    kinds: dict[type, str] = {
        Size: "size",
        Duration: "duration",
        Switch: "switch",
        PathName: "path",
        fields.Integer: "number",
        fields.Float: "number",
    }
    return kinds.get(type(field), "text")


def _field_for(
    hint: Any, kind: Callable[..., fields.Field[Any]] | None, validate: Any
) -> fields.Field[Any]:
    arguments: dict[str, Any] = {}
    if validate is not None:
        arguments["validate"] = validate
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        arguments["allow_none"] = True
    if typing.get_origin(hint) is tuple:
        return Items(_field_for(typing.get_args(hint)[0], kind, None), **arguments)
    if kind is not None:
        return kind(**arguments)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Choice(hint, **arguments)
    simple: dict[Any, Callable[..., fields.Field[Any]]] = {
        bool: Switch,
        int: fields.Integer,
        float: fields.Float,
        str: Text,
        Path: PathName,
    }
    return simple[hint](**arguments)
