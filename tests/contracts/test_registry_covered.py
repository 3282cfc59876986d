"""Every backend that the configuration can name is held to its contract."""

from __future__ import annotations

import ast
from enum import Enum
from pathlib import Path

import pytest

from tuswsgi.config import backends, registry
from tuswsgi.config.loading import Config

HERE = Path(__file__).parent

#: The contract suites by the names of backends, and how a backend is made.
CONTRACTS = {
    backends.DataStoreName: ("DataStoreContract", "storage", registry.data_store),
    backends.InfoStoreName: ("InfoStoreContract", "info_storage", registry.info_store),
    backends.LockerName: ("LockerContract", "locker", registry.locker),
}

#: What a backend needs to be told, besides its name.
NEEDS = {
    backends.InfoStoreName.REDIS: {"info_db_dsn": "redis://127.0.0.1"},
    backends.LockerName.REDIS: {"locker_dsn": "redis://127.0.0.1"},
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


def test_the_registry_has_no_other_names() -> None:
    names = {
        value
        for value in vars(registry).values()
        if isinstance(value, type) and issubclass(value, Enum) and value is not Enum
    }
    assert names == set(CONTRACTS), "a kind of backend without a contract"


@pytest.mark.parametrize("name", BACKENDS, ids=lambda name: name.value)
def test_a_backend_is_held_to_its_contract(name: Enum, tmp_path: Path) -> None:
    contract, option, make = CONTRACTS[type(name)]
    flags = {option: name.value, "data_dir": str(tmp_path), **NEEDS.get(name, {})}
    config = Config.load(flags=flags)
    backend = type(make(config)).__name__
    assert any({backend, contract} <= names for names in contract_tests().values()), (
        f"{name.value} is made by {backend}: tests/contracts needs a {contract} of it"
    )
