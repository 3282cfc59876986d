"""The structure of the code: its packages, what they import, and some figures.

``python tests/structure.py`` prints them, and fails if an import is not allowed. ``test_layers``
tests the same.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "tuswsgi"

#: The packages and loose modules from the bottom up. Each may import only those before it.
ORDER = (
    "core",
    "observing",
    "connections",
    "lockers",
    "infostores",
    "datastores",
    "hooks",
    "outbox",
    "transfer",
    "protocol",
    "testing",
    "web",
    "metrics",
    "config",
    "app",
    "serving",
    "commands",
    "__main__",
    "__init__",
)

#: The package that decides what requests do to uploads, and its modules that serve no requests.
HEART = "protocol"
NOT_FOR_REQUESTS = ("cleanup", "sweep", "readiness")

MODULES = {
    ".".join(("tuswsgi", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}


def package(module: str) -> str:
    """Return the package of a module, or its own name if it is in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def imports(module: str, *, of_types: bool = True, at_top: bool = False) -> Iterator[str]:
    """Yield the full names of the modules that a module imports.

    :param of_types: include imports for annotations only.
    :param at_top: leave out imports in functions.
    """
    yield from _imports(tree(module), of_types, at_top)


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


def own_imports(module: str) -> set[str]:
    """Return the modules of tuswsgi that a module imports, in functions and for types too."""
    found = {name for name in imports(module) if name in MODULES}
    return found - {module}


def arrows() -> dict[str, dict[str, set[str]]]:
    """Return which packages each package imports, with the imports of modules that cause it."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in MODULES:
        for imported in own_imports(module):
            if package(imported) != package(module):
                found[package(module)][package(imported)].add(f"{module} -> {imported}")
    return found


def circles() -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    graph = {module: own_imports(module) for module in MODULES}
    return [sorted(circle) for circle in _components(graph) if len(circle) > 1]


def _components(graph: Mapping[str, Iterable[str]]) -> Iterator[set[str]]:
    """Yield the strongly connected components of a graph (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[set[str]]:
        number[node] = low[node] = len(number)
        stack.append(node)
        for following in graph[node]:
            if following not in number:
                yield from visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], number[following])
        if low[node] == number[node]:
            component: set[str] = set()
            while node not in component:
                component.add(stack.pop())
            yield component

    for node in graph:
        if node not in number:
            yield from visit(node)


def wrong_arrows() -> list[str]:
    """Return the imports that do not lead down."""
    return [
        example
        for source, targets in arrows().items()
        for target, examples in targets.items()
        if ORDER.index(target) >= ORDER.index(source)
        for example in sorted(examples)
    ]


def lines(modules: Iterable[str]) -> int:
    return sum(len(MODULES[module].read_text("utf-8").splitlines()) for module in modules)


def table() -> str:
    """Return the packages from the top down, with their sizes and imports."""
    found = arrows()
    rows = []
    for name in reversed(ORDER):
        own = [module for module in MODULES if package(module) == name]
        below = sorted(found[name], key=ORDER.index)
        rows.append(f"{name:12} {len(own):3} modules {lines(own):6} lines -> {' '.join(below)}")
    return "\n".join(rows)


def figures() -> dict[str, int]:
    """Return the figures of the structure by their names."""
    packages = {package(module) for module in MODULES if MODULES[module].name == "__init__.py"}
    packages.discard("__init__")
    names = {package(module) for module in MODULES}
    heart = [module for module in MODULES if package(module) == HEART]
    heart = [module for module in heart if not module.endswith(NOT_FOR_REQUESTS)]
    return {
        "packages": len(packages),
        "loose modules": len(names - packages),
        "modules": len(MODULES),
        "arrows between packages": sum(map(len, arrows().values())),
        "circles": len(circles()),
        f"lines of {HEART} that serve requests": lines(heart),
        "lines": lines(MODULES),
    }


def modules_of_a_patch() -> list[str]:
    """Return the modules that one small PATCH enters, measured with a running server."""
    from e2e.client import patch_headers
    from e2e.conftest import app_server, running

    with (
        tempfile.TemporaryDirectory() as directory,
        running(app_server("counting_app", Path(directory) / "data")) as server,
        server.client.connect() as connection,
    ):
        path = server.client.create(100)
        entered: dict[str, float] = {}
        for offset in range(3):  # the first one also enters what is initialised once
            connection.request("GET", "/profile", {})
            connection.request("PATCH", path, patch_headers(offset), b"x")
            entered = json.loads(connection.request("GET", "/profile/end", {}).body)
        return sorted(name[4:] for name in entered if name.startswith("in /"))


def main() -> None:
    print(table())
    print()
    for name, number in figures().items():
        print(f"{name}: {number}")
    entered = modules_of_a_patch()
    print(f"modules that one PATCH enters: {len(entered)}")
    print("  " + " ".join(entered))
    problems = [*wrong_arrows(), *(f"a circle: {', '.join(circle)}" for circle in circles())]
    if problems:
        print("\n".join(["", "These imports are not allowed:", *problems]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
