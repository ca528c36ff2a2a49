"""ADMM pruning: masks tightened step by step, with the least-squares weights for each found by ADMM."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from ..hessian import Gram
from .calibrated import Layer, _CalibratedPruning


class ADMMPruning(_CalibratedPruning):
    """Fast weight update by ADMM with a gradual mask (Boza 2024, TMLR, arXiv 2401.02938, algorithms 1 and 2).

    Works on inputs normalised to unit norm, so that the mask by magnitude is Wanda's score. The cubic ramp of the
    sparsity over the first `ramp_iterations` is as in the paper's text.
    """

    iterations: int = Field(default=20, ge=1)
    """ADMM iterations in all."""
    ramp_iterations: int = Field(default=15, ge=1)
    """Iterations over which the mask tightens to the target; after them it is fixed."""
    dampening_frac: float = Field(default=0.1, gt=0)
    """Added to the normalised Gram matrix's diagonal, as a fraction of its mean."""
    rho: float = Field(default=1.0, gt=0)
    """The penalty that pulls the weights to the mask."""

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        norms = gram.matrix.diagonal().sqrt()
        dead = norms == 0
        norms = torch.where(dead, 1.0, norms)
        a = gram.matrix / torch.outer(norms, norms)
        a.diagonal().add_(self.dampening_frac * float(a.diagonal().mean()))
        inverse = torch.linalg.inv(a + self.rho * torch.eye(len(a), device=a.device))
        return [self._solve(layer, dead, norms, a, inverse) for layer in layers]

    def _solve(
        self,
        layer: Layer,
        dead: torch.Tensor,
        norms: torch.Tensor,
        a: torch.Tensor,
        inverse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a and inverse are symmetric, so rows stay rows: W' A instead of A W'."""
        w = layer.weight * norms
        alive = layer.kept & ~dead
        target = w @ a
        u = torch.zeros_like(w)
        mask = alive
        for step in range(self.iterations):
            if step < self.ramp_iterations:
                sparsity = layer.sparsity * (1 - (1 - (step + 1) / self.ramp_iterations) ** 3)
                scores = (w + u).abs_().masked_fill_(~alive, -1.0)
                mask = layer.structure.mask(scores, sparsity) & alive
            z = (w + u).masked_fill_(~mask, 0)
            u = u + w - z
            w = (target + self.rho * (z - u)) @ inverse
        return (w + u).masked_fill_(~mask, 0) / norms, mask
