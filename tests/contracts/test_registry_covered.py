"""Every backend that the configuration can name is held to its contract."""

from __future__ import annotations

import ast
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path

import pytest

from tuswsgi.config import registry
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.options import options_of
from tuswsgi.datastores.settings import DataStoreName
from tuswsgi.infostores.settings import InfoStoreName
from tuswsgi.lockers.settings import LockerName

HERE = Path(__file__).parent

#: The contract suites by the names of backends, with the options that choose these.
CONTRACTS = {
    DataStoreName: ("DataStoreContract", "storage", Backends.data_store),
    InfoStoreName: ("InfoStoreContract", "info_storage", Backends.info_store),
    LockerName: ("LockerContract", "locker", Backends.locker),
}

#: What a backend needs to be told, besides its name.
NEEDS = {
    InfoStoreName.REDIS: {"info_db_dsn": "redis://127.0.0.1"},
    LockerName.REDIS: {"locker_dsn": "redis://127.0.0.1"},
}

BACKENDS = [name for names in CONTRACTS for name in names]


def contract_tests() -> dict[str, set[str]]:
    """Return each test class beside this file with all that it and its bases name."""
    classes: dict[str, tuple[list[str], set[str]]] = {}
    for file in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                classes[node.name] = [ast.unparse(base) for base in node.bases], names

    def named(name: str) -> set[str]:
        bases, names = classes.get(name, ([], set()))
        return names.union(*(named(base) for base in bases))

    return {name: named(name) for name in classes if name.startswith("Test")}


def test_the_registry_has_every_name() -> None:
    tables = [registry.DATA_STORES, registry.INFO_STORES, registry.LOCKERS]
    assert [list(table) for table in tables] == [list(names) for names in CONTRACTS]


@pytest.mark.parametrize(
    "backend",
    [
        *registry.DATA_STORES.values(),
        *registry.INFO_STORES.values(),
        *registry.LOCKERS.values(),
        *registry.TRANSPORTS,
    ],
    ids=lambda backend: backend.path,
)
def test_the_registry_says_which_backends_have_options(backend: registry.Backend) -> None:
    kind = backend.load()
    assert (is_dataclass(kind) and any(options_of(kind))) is backend.has_options


@pytest.mark.parametrize("name", BACKENDS, ids=lambda name: name.value)
def test_a_backend_is_held_to_its_contract(name: Enum, tmp_path: Path) -> None:
    contract, option, make = CONTRACTS[type(name)]
    flags = {option: name.value, "data_dir": str(tmp_path), **NEEDS.get(name, {})}
    backends = Backends(Config.load(flags=flags))
    backend = type(make(backends)).__name__
    assert any({backend, contract} <= names for names in contract_tests().values()), (
        f"{name.value} is made by {backend}: tests/contracts needs a {contract} of it"
    )
