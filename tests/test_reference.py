"""The generated reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuswsgi.config import reference
from tuswsgi.config.loading import Config, all_options
from tuswsgi.core.options import Items, Text

CONF = Path(__file__).parent.parent / "conf"


def test_the_files_in_the_repository_are_up_to_date() -> None:
    for name, text in reference.files().items():
        assert reference.difference(CONF / name, text) == ""


def test_every_option_is_in_both_files_with_its_names() -> None:
    files = reference.files()
    rows = files["README.md"].splitlines()
    for option in all_options():
        (row,) = (line for line in rows if f"| `{option.flags[0]}`" in line)
        assert row.startswith(f"| `{option.name}` |")
        for name in (*option.flags, *option.variables):
            assert f"`{name}`" in row
        assert f"\n;{option.name} =" in files["tuswsgi.ini"]


def test_the_ini_file_is_valid_with_every_option_uncommented(tmp_path: Path) -> None:
    lines = reference.files()["tuswsgi.ini"].splitlines()
    text = "\n".join(line[1:] if line[:1] == ";" and line[1:2] != " " else line for line in lines)
    file = tmp_path / "all.ini"
    file.write_text(text)
    config = Config.load(file)
    for option in all_options():
        assert config.value(option) == option.default, option.key
        assert config.source(option) == str(file)


def test_a_difference_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "x"
    assert "+new" in reference.difference(file, "new\n")
    file.write_text("old\n")
    shown = reference.difference(file, "new\n")
    assert "-old" in shown
    assert "+new" in shown
    assert reference.difference(file, "old\n") == ""


def test_secrets_are_masked() -> None:
    dsn = "sqlite:////secret/place"
    shown = reference.configured(Config.load(environ={"TUSWSGI_INFO_DB_DSN": dsn}))
    assert "secret/place" not in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("info_db_dsn"))
    assert "********" in line
    assert line.endswith("# TUSWSGI_INFO_DB_DSN")


URLS = (
    "https://anna:PASSWORD@host:1/path?token=PASSWORD&PASSWORD",
    "amqp://:PASSWORD@host/vhost?heartbeat=PASSWORD",
    "anna:PASSWORD@host:8081",
    "postgres://anna:PASS/PASSWORD?PASSWORD@host/name",
)


@pytest.mark.parametrize("url", URLS)
def test_no_option_shows_the_secrets_of_urls(url: str) -> None:
    values: dict[str, Any] = {one.key: one.default for one in all_options()}
    texts: dict[str, Any] = {one.key: url for one in all_options() if isinstance(one.field, Text)}
    for one in all_options():
        if isinstance(one.field, Items) and isinstance(one.field.item, Text):
            texts[one.key] = (url, url)
    assert {"hooks_http_urls", "hooks_grpc_endpoint", "sentry_dsn", "locker_dsn"} <= texts.keys()
    shown = reference.configured(Config(values | texts, {}))
    assert shown.count("********") >= len(texts)
    assert "PASS" not in shown


def test_what_a_url_has_besides_secrets_is_shown() -> None:
    flags = {"hooks_http_urls": f"{URLS[0]},http://localhost:8000/hooks"}
    shown = reference.configured(Config.load(flags=flags))
    first = "https://********@host:1/path?token=********&********"
    assert f"urls = {first},http://localhost:8000/hooks " in shown


def test_an_unset_secret_is_not_masked() -> None:
    assert "*****" not in reference.configured(Config.load())


@pytest.mark.parametrize("name", ["README.md", "tuswsgi.ini"])
def test_the_files_are_the_same_each_time(name: str) -> None:
    assert reference.files()[name] == reference.files()[name]
