"""What lowering an architecture yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..graph import Model, Op


@dataclass(frozen=True)
class Program:
    """Ops over the checkpoint's own parameter names, and what is not a parameter.

    `constants` are vectors the ops name that are computed, not stored (rope frequencies). `tied` is
    the embedding's name when the head is the same matrix; the head op still names its own weight,
    and the exporter resolves it.
    """

    model: Model
    ops: tuple[Op, ...]
    constants: dict[str, NDArray[Any]]
    tied: str | None
