"""Imports go strictly down, from package to package, and never in a circle."""

from __future__ import annotations

import pytest
from structure import (
    MODULES,
    ORDER,
    circles,
    imports,
    own_imports,
    package,
    table,
    wrong_arrows,
)

#: The packages of backends, whose modules do not know each other.
BACKENDS = ("datastores", "infostores", "lockers", "hooks")

#: What backends of one kind have in common, and is no backend itself.
SHARED = {
    "datastores.base",
    "datastores.scan",
    "datastores.quarantine",
    "datastores.segments",
    "infostores.base",
    "infostores.entry",
    "infostores.markers",
    "infostores.record",
    "lockers.base",
    "lockers.lease",
    "lockers.lock_files",
    "lockers.lock_sockets",
    "lockers.session",
    "hooks.answers",
    "hooks.base",
    "hooks.forwarding",
    "hooks.manager",
    "hooks.payloads",
    "hooks.programs",
    "hooks.retries",
    "hooks.settings",
}

#: The packages and loose modules that know Flask.
EDGE = ("web", "app", "serving", "commands", "__init__")

#: What runs under gunicorn's gevent workers only.
NEEDS_GEVENT = {
    "tuswsgi.serving.worker",
    "tuswsgi.serving.master",
    "tuswsgi.commands.cli",
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_backend(module: str) -> bool:
    own = module.removeprefix("tuswsgi.")
    return "." in own and package(module) in BACKENDS and own not in SHARED


def test_every_package_has_its_place() -> None:
    assert {package(module) for module in MODULES} == set(ORDER)


def test_imports_go_strictly_down() -> None:
    assert not wrong_arrows(), "\n".join([*wrong_arrows(), "", table()])


def test_no_circles() -> None:
    assert not circles(), "\n".join([*map(" <-> ".join, circles()), "", table()])


def test_only_the_edge_knows_flask(module: str) -> None:
    if package(module) not in EDGE:
        known = {imported.split(".")[0] for imported in imports(module)}
        assert not known & {"flask", "werkzeug"}


def test_backends_do_not_know_each_other(module: str) -> None:
    if is_backend(module):
        others = {name for name in own_imports(module) if package(name) == package(module)}
        assert not [name for name in others if is_backend(name)]


def test_the_protocol_sees_interfaces(module: str) -> None:
    if package(module) == "protocol":
        assert not [name for name in own_imports(module) if is_backend(name)]


def test_gunicorn_is_known_to_whom_it_serves(module: str) -> None:
    if package(module) not in ("transfer", "serving"):
        known = {imported.split(".")[0] for imported in imports(module)}
        assert "gunicorn" not in known or module == "tuswsgi.commands.cli"


def test_gevent_is_imported_where_it_is_used(module: str) -> None:
    # Under sync and gthread workers, and for `--help`, it is neither needed nor wanted.
    known = {imported.split(".")[0] for imported in imports(module, at_top=True)}
    assert "gevent" not in known or module in NEEDS_GEVENT


def test_nobody_patches_on_import(module: str) -> None:
    assert "monkey.patch" not in MODULES[module].read_text("utf-8") or module in NEEDS_GEVENT
