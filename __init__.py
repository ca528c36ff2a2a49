"""Paring: recipes that pare language models down, and a CPU engine that is faster for it.

The names below are loaded when first used, so that `import paring.engine` never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .modifiers import Modifier, Session
    from .pipeline import apply
    from .recipes import Recipe

    __version__: str

__all__ = ["Engine", "Modifier", "Recipe", "Session", "__version__", "apply"]

_HOMES = {
    "Engine": "engine",
    "Modifier": "modifiers",
    "Recipe": "recipes",
    "Session": "modifiers",
    "apply": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("paring")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("." + _HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
