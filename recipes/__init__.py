"""Recipes: the YAML that says what to do to a model, and when.

`Recipe` is loaded when first used, so that the library can be listed without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .schema import (
        DataConfig,
        ExportConfig,
        LoraConfig,
        MixturePart,
        Recipe,
        RowsConfig,
        Stage,
        TrainingConfig,
    )

__all__ = [
    "DataConfig",
    "ExportConfig",
    "LoraConfig",
    "MixturePart",
    "Recipe",
    "RowsConfig",
    "Stage",
    "TrainingConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".schema", __name__), name)
