"""A room imports only from the floors below it (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "errors": 0,
    "progress": 0,
    "zoo": 1,
    "engine": 1,
    "modifiers": 2,
    "recipes": 3,
    "pipeline": 4,
    "cli": 5,
}
# The only libraries that the rooms which must stay light may use.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "zoo": {"numpy", "yaml", "pydantic"},
    "engine": {"numpy", "safetensors", "tokenizers", "jinja2"},
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions; `paring.` for its own."""
    package = ["paring", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*whole, alias.name]) for alias in node.names)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_below(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py")
    wrong = []
    for path in files:
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "paring":
                fine = rest[0] == room or FLOORS[rest[0]] < FLOORS[room]
            else:
                fine = top in sys.stdlib_module_names or top in LIBRARIES.get(room, {top})
            if not fine:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_folder_with_code_has_a_floor() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= set(FLOORS)
