"""DSNs: how they are parsed, and the errors about wrong ones."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from tuswsgi.connections.databases import connect
from tuswsgi.connections.dsn import Dsn
from tuswsgi.core.errors import ConfigurationError


def test_a_dsn_is_decoded() -> None:
    dsn = Dsn.parse("mysql://us%40er:p%2Fa%3As%23%25@[::1]:1234,b/my%2Fdb?ssl-mode=required")
    assert (dsn.scheme, dsn.hosts, dsn.path) == ("mysql", (("::1", 1234), ("b", None)), "my/db")
    assert (dsn.user, dsn.password) == ("us@er", "p/a:s#%")
    assert dsn.parameters == {"ssl-mode": "required"}
    assert str(dsn) == "mysql://[::1]:1234,b/my/db"
    assert "p/a" not in repr(dsn)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgres://me:se/cret@host/db",
        "postgres://me:secret@host:port/db",
        "postgres://me:secret@host",
        "mysql://me:secret@host/",
        "mysql://me:sec#ret@host/db",
        "mysql://me:secret@host/db?secret",
        "mysql://me:secret@[host/db",
        "mysql://me:secret@one,two/db",
    ],
)
def test_errors_about_dsns_contain_no_secrets(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encoded") as caught:
        connect(dsn)
    assert "se" not in str(caught.value).replace("user", "").replace("base", "")


def test_unknown_parameters_are_reported() -> None:
    with pytest.raises(ConfigurationError, match="not supported: colour"):
        connect("mysql://me:secret@host/db?colour=red").prepare()


@pytest.mark.parametrize(
    ("dsn", "library", "extra"),
    [
        ("postgres://host/db", "psycopg", "postgres"),
        ("postgresql://host/db", "psycopg", "postgres"),
        ("mysql://host/db", "pymysql", "mysql"),
    ],
)
def test_a_missing_library_is_named(
    dsn: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return there(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, f"tuswsgi.connections.{extra}", raising=False)
    monkeypatch.setattr(builtins, "__import__", find)
    with pytest.raises(ConfigurationError, match=rf"{library}.*tuswsgi-server\[{extra}\]"):
        connect(dsn)
