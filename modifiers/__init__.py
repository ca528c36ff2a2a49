"""Modifiers: what a recipe does to a model. Importing this package registers every algorithm in its families."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Modifier, ModifierError, load_modifiers, registry
from .masks import Masks
from .session import Session

__all__ = ["Masks", "Modifier", "ModifierError", "Session", "load_modifiers", "registry"]

for _module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)
