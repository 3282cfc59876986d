"""Options: a setting is declared once, beside the code that it sets.

A group of options is a dataclass whose fields are made with ``option()``. From that one
declaration come the INI key, the environment variable, the flag, the validation and the
row in the reference. This file defines the declaration, the types of values and the names:

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
from datetime import timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

from marshmallow import ValidationError, fields

from tuswsgi.core.display import MASK, without_secrets

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

#: Called with a value; raises marshmallow's ``ValidationError``.
Validator = Callable[[Any], Any]

#: The section whose options have no prefix.
MAIN = "tuswsgi"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    # As in dd: K and KiB are 1,024, KB is 1,000.
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
    """A time in seconds: ``20``, ``1.5``, ``500ms``, ``12h``, ``7d``, or a ``timedelta``."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
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
    """One of the values of an enum, in any case.

    The enum's ``_missing_`` may accept more names.
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
    """A declared option.

    :param section: the section of the INI file.
    :param name: the key in the section, and the field of the dataclass.
    :param field: parses, validates and prints the value.
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
        """The words of the section, unless it is the main one, and of the name."""
        prefix = [] if self.section == MAIN else re.split(r"[._]", self.section)
        return prefix + self.name.split("_")

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags, ours first; a switch also has one with ``--no-``."""
        own = "--" + "-".join(self.words)
        short = (f"-{self.short}",) if self.short else ()
        return (own, *short, *(f"--{alias}" for alias in self.aliases))

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables in their order of precedence."""
        own = "TUSWSGI_" + "_".join(self.words).upper()
        if self.rustus is None:
            return (own,)
        as_rustus = f"TUSWSGI_{self.rustus}"
        return (own, *((as_rustus,) if as_rustus != own else ()), f"RUSTUS_{self.rustus}")

    @property
    def key(self) -> str:
        """The unique name among all options, also that of the keyword argument of ``Tus``."""
        return "_".join(self.words)

    @property
    def kind(self) -> str:
        """The type for the reference: ``size``, ``a|b`` for a choice, ``text,...`` for a list."""
        if isinstance(self.field, Items):
            return f"{_kind(self.field.item)},..."
        return _kind(self.field)

    def show(self, value: Any) -> str:
        """Return a value as the INI file has it, an empty text if it is unset."""
        return "" if value is None else str(self.field._serialize(value, self.name, None))

    def show_masked(self, value: Any) -> str:
        """Return a value as ``show``, with secrets masked, also those in URLs."""
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
    """Declare an option as a field of a dataclass.

    :param default: ``None`` for "unset".
    :param help: one or two sentences for the reference and ``--help``.
    :param kind: the field's class if the annotation does not tell it, e.g. ``Size``.
    :param rustus: rustus' environment variable without its prefix ``RUSTUS_``.
    :param short: the letter of a short flag.
    :param aliases: more flags that mean this option, without their dashes.
    :param secret: mask the value wherever it is printed. Secrets in URLs are always masked.
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

    Its attribute ``section`` names the section, ``MAIN`` by default.
    """
    section = getattr(group, "section", MAIN)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        declared: Mapping[str, Any] | None = field.metadata.get("option")
        if declared is None:
            continue
        default = None if field.default is MISSING else field.default
        kind = _field_for(hints[field.name], declared["kind"], declared["validate"])
        # The class may be annotated as if it always had a value: ``config`` computes one.
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
    """Return the title of a group of options: the first line of its docstring."""
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
