"""Imports go only downward: the rows of the design, enforced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tuswsgi

ROOT = Path(tuswsgi.__file__).parent

#: Rows from the bottom up; a module is in the row of its longest prefix.
ROWS = {
    "tuswsgi": 0,  # the package itself loads its public names when they are first used
    "tuswsgi.display": 0,
    "tuswsgi.errors": 0,
    "tuswsgi.extensions": 0,
    "tuswsgi.info": 0,
    "tuswsgi.logs": 0,
    "tuswsgi.options": 0,
    "tuswsgi.paths": 0,
    "tuswsgi.probe": 0,
    "tuswsgi.process": 0,
    "tuswsgi.signals": 0,
    "tuswsgi.spawn": 0,
    "tuswsgi.telemetry": 0,
    "tuswsgi.connections": 1,
    "tuswsgi.datastores.base": 1,
    "tuswsgi.infostores.base": 1,
    "tuswsgi.infostores.record": 1,
    "tuswsgi.lockers.base": 1,
    "tuswsgi.hooks.base": 1,
    "tuswsgi.datastores": 2,
    "tuswsgi.infostores": 2,
    "tuswsgi.lockers": 2,
    "tuswsgi.hooks": 2,
    "tuswsgi.testing": 2,
    "tuswsgi.protocol": 3,
    "tuswsgi.metrics": 4,
    "tuswsgi.metrics_directory": 4,
    "tuswsgi.web": 4,
    "tuswsgi.backends": 5,
    "tuswsgi.config": 5,
    "tuswsgi.reference": 5,
    "tuswsgi.registry": 5,
    "tuswsgi.runtime": 5,
    "tuswsgi.sentry": 5,
    "tuswsgi.server": 5,
    "tuswsgi.__main__": 6,
    "tuswsgi.app": 6,
    "tuswsgi.cli": 6,
    "tuswsgi.client": 6,
    "tuswsgi.command": 6,
    "tuswsgi.copying": 6,
    "tuswsgi.gunicorn_log": 6,
    "tuswsgi.http1": 6,
    "tuswsgi.inventory": 6,
    "tuswsgi.master": 6,
    "tuswsgi.outbox": 6,
    "tuswsgi.upload_commands": 6,
    "tuswsgi.worker": 6,
}

#: The kinds of backends, whose modules never import each other.
BACKENDS = ("tuswsgi.datastores", "tuswsgi.infostores", "tuswsgi.lockers", "tuswsgi.hooks")

#: What backends of one kind have in common, and is no backend itself.
SHARED = {
    ("tuswsgi.datastores", "tuswsgi.datastores.places"),
    ("tuswsgi.datastores", "tuswsgi.datastores.quarantine"),
    ("tuswsgi.datastores", "tuswsgi.datastores.segments"),
    ("tuswsgi.infostores", "tuswsgi.infostores.record"),
    ("tuswsgi.infostores", "tuswsgi.infostores.markers"),
    ("tuswsgi.infostores", "tuswsgi.infostores.outbox"),
    ("tuswsgi.lockers", "tuswsgi.lockers.lease"),
    ("tuswsgi.lockers", "tuswsgi.lockers.session"),
    ("tuswsgi.hooks", "tuswsgi.infostores.record"),
    ("tuswsgi.hooks", "tuswsgi.hooks.answers"),
    ("tuswsgi.hooks", "tuswsgi.hooks.events"),
    ("tuswsgi.hooks", "tuswsgi.hooks.forwarding"),
    ("tuswsgi.hooks", "tuswsgi.hooks.payloads"),
    ("tuswsgi.hooks", "tuswsgi.hooks.claims"),
    ("tuswsgi.hooks", "tuswsgi.hooks.lanes"),
    ("tuswsgi.hooks", "tuswsgi.hooks.retries"),
}

#: What runs under gunicorn's gevent workers only.
NEEDS_GEVENT = {"tuswsgi.worker", "tuswsgi.cli", "tuswsgi.master"}

MODULES = {
    ".".join(("tuswsgi", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}


def row(module: str) -> int:
    while module not in ROWS:
        module, dot, _ = module.rpartition(".")
        assert dot
    return ROWS[module]


def imports(module: str, *, of_types: bool = False, at_top: bool = False) -> Iterator[str]:
    """Yield what a module imports, modules of this package by their full name.

    :param of_types: also what is imported for annotations only.
    :param at_top: only what is imported with the module.
    """
    yield from _imports(ast.parse(MODULES[module].read_text("utf-8")), of_types, at_top)


def _imports(node: ast.AST, of_types: bool, at_top: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide where they lead"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else str(child.module)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            if of_types:
                yield from _imports(child, of_types, at_top)
        elif not (at_top and isinstance(child, (ast.FunctionDef, ast.Lambda))):
            yield from _imports(child, of_types, at_top)


def is_concrete(module: str) -> bool:
    return module.startswith(tuple(f"{kind}." for kind in BACKENDS)) and not module.endswith(
        ".base"
    )


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_module_has_its_row() -> None:
    packages = {"tuswsgi.web", "tuswsgi.protocol", "tuswsgi.testing", "tuswsgi.connections"}
    for name in MODULES:
        parent = name.rpartition(".")[0]
        assert name in ROWS or parent in packages.union(BACKENDS), f"in which row is {name}?"


def test_imports_go_down(module: str) -> None:
    for imported in imports(module):
        if imported.split(".")[0] == "tuswsgi":
            assert row(imported) <= row(module), f"{module} imports {imported}"


def test_only_the_edge_knows_flask(module: str) -> None:
    if module.startswith("tuswsgi.web") or row(module) == 6:
        return
    known = {imported.split(".")[0] for imported in imports(module, of_types=True)}
    assert not known & {"flask", "werkzeug"}


def test_backends_do_not_know_each_other(module: str) -> None:
    if not is_concrete(module):
        return
    kind = module.rpartition(".")[0]
    for imported in imports(module, of_types=True):
        if is_concrete(imported) and (kind, imported) not in SHARED:
            pytest.fail(f"{module} imports {imported}")


def test_the_protocol_sees_interfaces(module: str) -> None:
    if not module.startswith("tuswsgi.protocol"):
        return
    seen = {name for name in imports(module, of_types=True) if is_concrete(name)}
    assert seen <= {"tuswsgi.hooks.manager"}
    assert not any(name.startswith("tuswsgi.web") for name in imports(module, of_types=True))


def test_gevent_is_imported_where_it_is_used(module: str) -> None:
    # Under sync and gthread workers, and for `--help`, it is neither needed nor wanted.
    known = {imported.split(".")[0] for imported in imports(module, at_top=True)}
    assert "gevent" not in known or module in NEEDS_GEVENT


def test_nobody_patches_on_import(module: str) -> None:
    assert "monkey.patch" not in MODULES[module].read_text("utf-8") or module in NEEDS_GEVENT
