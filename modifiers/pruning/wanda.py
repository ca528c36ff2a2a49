"""Wanda: prune by weight magnitude times input norm, without updating the weights that stay."""

from __future__ import annotations

from typing import Any

import torch

from ..hessian import Gram
from .calibrated import _CalibratedPruning


class Wanda(_CalibratedPruning):
    """Wanda (Sun et al. 2023, arXiv 2306.11695): score |W_ij| * ||X_j||_2, the lowest removed in each output row."""

    def prune(
        self,
        gram: Gram,
        weights: list[torch.Tensor],
        kept: list[torch.Tensor],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        norms = gram.matrix.diagonal().sqrt()
        results = []
        for weight, alive in zip(weights, kept, strict=True):
            scores = (weight.abs() * norms).masked_fill_(~alive, -1.0)
            mask = self.structure.mask(scores, self.target_sparsity, per_row=True)
            results.append((weight, mask))
        return results
