"""Magnitude pruning: remove the smallest weights, at once or step by step while training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .gradual import _GradualPruning

if TYPE_CHECKING:
    from ..session import Session


class MagnitudePruning(_GradualPruning):
    """Remove the smallest weights, per layer or over all layers at once.

    In a training stage the sparsity goes from `init_sparsity` at `start` to `final_sparsity` at `end`, exactly, along
    the ramp of Zhu & Gupta 2017 (arXiv 1710.01878); afterwards the mask is held. One-shot: `final_sparsity` at once.
    """

    def scores(self, session: Session, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: weight.abs().float() for name, weight in weights.items()}
