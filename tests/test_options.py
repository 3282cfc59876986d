"""The kinds of options, and the rule that names them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest
from marshmallow import ValidationError

from tuswsgi.config.loading import all_options
from tuswsgi.core.options import (
    Duration,
    GiB,
    KiB,
    MiB,
    Option,
    Size,
    option,
    options_of,
    title,
)


class Colour(str, Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


@dataclass
class Paint:
    """What a wall is painted with.

    More about it.
    """

    section: ClassVar[str] = "wall.paint"

    colour: Colour = option(Colour.RED, "The colour.")
    others: tuple[Colour, ...] = option((), "More colours.", short="o")
    bucket_size: int = option(5 * MiB, "The size of a bucket.", kind=Size, rustus="BUCKET")
    limit: int | None = option(None, "No more than this.", kind=Size)
    drying: float = option(90.0, "How long it dries.", kind=Duration)
    place: Path | None = option(None, "Where it is.", aliases=("hooks-dir",))
    is_matt: bool = option(False, "Whether it is matt.")
    layers: int = option(2, "How often.")
    name: str = option("white", "Its name.")
    secret: str | None = option(None, "The recipe.", secret=True)
    not_an_option: int = 3


OPTIONS = {one.name: one for one in options_of(Paint)}


def read(name: str, text: Any) -> Any:
    return OPTIONS[name].field.deserialize(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MiB),
        (" 50MiB ", 50 * MiB),
        ("50 mib", 50 * MiB),
        ("5GB", 5 * 10**9),
        ("5G", 5 * GiB),
        ("64k", 64 * KiB),
        ("1.5KiB", 1536),
        ("12B", 12),
        (str(2**63 - 1), 2**63 - 1),
        (4096, 4096),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert read("bucket_size", text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e6", "MiB", "5 XB", "1,5MB", "٣", "0x10", "1_000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValidationError, match="Not a size"):
        read("bucket_size", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20.0),
        ("1.5", 1.5),
        ("500ms", 0.5),
        ("2m", 120.0),
        ("12h", 43200.0),
        ("7 d", 604800.0),
        ("1w", 604800.0),
        (0.00001, 0.00001),
        (3, 3.0),
    ],
)
def test_durations(text: Any, seconds: float) -> None:
    assert read("drying", text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1y", "h", "1h30m", -1, True])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ValidationError, match="Not a duration"):
        read("drying", text)


def test_choices_in_any_case_and_as_themselves() -> None:
    assert read("colour", "Dark-Blue") is Colour.DARK_BLUE
    assert read("colour", Colour.RED) is Colour.RED
    with pytest.raises(ValidationError, match=r"Not one of red, dark-blue\."):
        read("colour", "green")


def test_lists_by_commas_and_lines() -> None:
    assert read("others", "red, dark-blue,") == (Colour.RED, Colour.DARK_BLUE)
    assert read("others", "\nred\ndark-blue") == (Colour.RED, Colour.DARK_BLUE)
    assert read("others", [Colour.RED]) == (Colour.RED,)
    assert read("others", "") == ()


def test_a_list_names_each_of_its_faults() -> None:
    with pytest.raises(ValidationError) as caught:
        read("others", "red,green,blue")
    assert [str(message).split(":")[0] for message in caught.value.messages] == ["green", "blue"]


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "True", True])
def test_switches_that_are_on(text: Any) -> None:
    assert read("is_matt", text) is True


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "FALSE", False])
def test_switches_that_are_off(text: Any) -> None:
    assert read("is_matt", text) is False


def test_paths_know_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert read("place", "~/x") == Path("/somewhere/x")
    with pytest.raises(ValidationError, match="empty path"):
        read("place", "")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bucket_size", 5 * MiB, "5MiB"),
        ("bucket_size", 1000, "1000"),
        ("bucket_size", 0, "0"),
        ("drying", 90.0, "90s"),
        ("drying", 7200.0, "2h"),
        ("drying", 0.5, "0.5s"),
        ("colour", Colour.DARK_BLUE, "dark-blue"),
        ("others", (Colour.RED, Colour.DARK_BLUE), "red,dark-blue"),
        ("is_matt", True, "true"),
        ("place", Path("/x"), "/x"),
        ("limit", None, ""),
    ],
)
def test_values_are_shown_as_they_are_written(name: str, value: Any, text: str) -> None:
    assert OPTIONS[name].show(value) == text


def test_every_default_is_read_back_from_what_is_shown() -> None:
    for one in all_options():
        if one.default is not None:
            assert one.field.deserialize(one.show(one.default)) == one.default, one.key


def test_the_naming_rule() -> None:
    bucket = OPTIONS["bucket_size"]
    assert bucket.flags == ("--wall-paint-bucket-size",)
    assert bucket.variables == (
        "TUSWSGI_WALL_PAINT_BUCKET_SIZE",
        "TUSWSGI_BUCKET",
        "RUSTUS_BUCKET",
    )
    assert bucket.key == "wall_paint_bucket_size"
    assert OPTIONS["others"].flags == ("--wall-paint-others", "-o")
    assert OPTIONS["place"].flags == ("--wall-paint-place", "--hooks-dir")


def test_the_main_section_adds_no_prefix() -> None:
    port = next(one for one in all_options() if one.key == "port")
    assert port.flags == ("--port",)
    assert port.variables == ("TUSWSGI_PORT", "TUSWSGI_SERVER_PORT", "RUSTUS_SERVER_PORT")


def test_a_group_tells_its_options_and_its_title() -> None:
    assert "not_an_option" not in OPTIONS
    assert title(Paint) == "What a wall is painted with"
    kinds = {name: one.kind for name, one in OPTIONS.items()}
    assert kinds["colour"] == "red|dark-blue"
    assert kinds["others"] == "red|dark-blue,..."
    assert kinds["bucket_size"] == kinds["limit"] == "size"
    assert kinds["name"] == kinds["secret"] == "text"


def test_no_two_options_share_a_name() -> None:
    for names in (_keys, _flags, _variables):
        every = [name for one in all_options() for name in names(one)]
        assert len(every) == len(set(every))


def _keys(one: Option) -> tuple[str, ...]:
    return (one.key,)


def _flags(one: Option) -> tuple[str, ...]:
    return one.flags


def _variables(one: Option) -> tuple[str, ...]:
    return one.variables


def test_every_option_says_what_it_does() -> None:
    for one in all_options():
        assert one.help.endswith("."), one.key
