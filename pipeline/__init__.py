"""Running recipes: models, data, stages, checkpoints, reports."""

from __future__ import annotations

from .apply import ApplyResult, apply
from .models import load_model
from .teachers import Teachers

__all__ = ["ApplyResult", "Teachers", "apply", "load_model"]
