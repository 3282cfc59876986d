"""The page about the architecture names what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from structure import ORDER

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")

#: A module that the page proposes to add.
EXAMPLE = "datastores/swift.py"

#: Modules and what they contain: ``web/views.py:Views.patch``. A path without a directory is a
#: loose module, or one of the package that the text is about.
REFERENCES = sorted(
    (path, name)
    for path, name in set(re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", PAGE))
    if path != EXAMPLE and ("/" in path or path.removesuffix(".py") in ORDER)
)


def names(file: Path) -> set[str]:
    """Return the classes, functions and constants of a module, and the members of its classes."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        own = _names(node)
        found |= own
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for child in node.body for name in _names(child)}
    return found


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("path", "name"), REFERENCES, ids="".join)
def test_what_the_page_names_exists(path: str, name: str) -> None:
    file = ROOT / path if path.startswith("tests/") else ROOT / "tuswsgi" / path
    assert file.is_file(), path
    assert not name or name in names(file), f"{path} has no {name}"


def test_the_page_lists_the_packages_in_their_order() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\.py)?` \|", PAGE, re.MULTILINE)
    assert rows == [name for name in ORDER if not name.startswith("__")]
