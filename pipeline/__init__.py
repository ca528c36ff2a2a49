"""Running recipes: models, data, stages, checkpoints, reports."""

from __future__ import annotations

from .apply import ApplyResult, apply
from .models import load_model

__all__ = ["ApplyResult", "apply", "load_model"]
