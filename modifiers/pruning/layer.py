"""What a calibrated pruner is told about one Linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..mask_structure import MaskStructure

if TYPE_CHECKING:
    from ..session import Session


@dataclass(frozen=True)
class Layer:
    """One Linear to prune: weight f32 [out, in], not to be changed, and what is to become of it."""

    name: str
    weight: torch.Tensor
    kept: torch.Tensor
    """bool [out, in]: False where a weight is zero and must stay so."""
    structure: MaskStructure
    sparsity: float


def not_gone(session: Session, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Which weights of a module are there still, bool [out, in]."""
    held = session.masks.get(f"{name}.weight")
    # a held mask before the zeros themselves: a kept weight may be zero by chance
    return weight != 0 if held is None else held.to(weight.device)
