"""Wanda: prune by weight magnitude times input norm, without updating the weights that stay."""

from __future__ import annotations

from typing import Any

import torch

from ..hessian import Gram
from .calibrated import Layer, _CalibratedPruning


class Wanda(_CalibratedPruning):
    """Wanda (Sun et al. 2023, arXiv 2306.11695): score |W_ij| * ||X_j||_2, the lowest removed in each output row.

    A block of weights scores the root of its weights' squares; blocks are compared within their row of blocks.
    """

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        norms = gram.matrix.diagonal().sqrt()
        results = []
        for layer in layers:
            scores = (layer.weight * norms).square_().masked_fill_(~layer.kept, -1.0)
            mask = layer.structure.mask(scores, layer.sparsity, per_row=True)
            results.append((layer.weight, mask))
        return results
