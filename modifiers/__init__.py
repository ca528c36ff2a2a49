"""Modifiers: what a recipe does to a model. Importing this package registers every algorithm in its families."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Modifier, ModifierError, load_modifiers, registry
from .mask_structure import MaskStructure
from .masks import Masks
from .pruning.calibrated import Layer
from .pruning.calibrated import _CalibratedPruning as CalibratedPruning
from .session import Session

__all__ = [
    "CalibratedPruning",
    "Layer",
    "MaskStructure",
    "Masks",
    "Modifier",
    "ModifierError",
    "Session",
    "load_modifiers",
    "registry",
]

for _module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)
