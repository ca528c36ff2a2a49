"""pyproject.toml asks for every library that the package imports."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("cli", "engine", "modifiers", "pipeline", "recipes", "zoo")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level modules of other libraries that the package imports, also inside functions."""
    names = set()
    for path in [
        *ROOT.glob("*.py"),
        *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
    ]:
        if path.name == "setup.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


OPTIONAL = ("lora",)  # extras whose libraries are imported where they are used


def test_every_import_is_asked_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = [re.search(rf'^{extra} = \["(.*)"\]$', project, re.MULTILINE) for extra in OPTIONAL]
    needed = [line for line in requires("paring") or [] if "extra ==" not in line]
    asked = {
        canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0])
        for line in (*needed, *(found[1] for found in extras if found))
    }
    homes = packages_distributions()
    missing = {
        name for name in imported() if not asked & {canonical(home) for home in homes.get(name, [])}
    }
    assert {"numpy", "torch"} <= imported()
    assert missing == set()
