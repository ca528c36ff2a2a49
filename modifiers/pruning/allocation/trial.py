"""A quick guess at what pruning a layer would cost: a short ADMM on the Gram matrix of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...hessian import Gram
from ...mask_structure import MaskStructure

DAMPENING, RHO = 0.1, 1.0
LEAST = 1e-3  # of the mean importance


class Outcome(NamedTuple):
    """Of pruning one Linear in one way."""

    error: float
    """Mean over tokens of the squared output error, each output's times its importance."""
    weights: float
    """The fraction of weights kept."""
    blocks: float
    """The fraction of 1x4 blocks with any weight kept."""


class Trial:
    """Prunes Linears that share one input to several sparsities, for their errors alone.

    The ADMM of Boza (arXiv 2401.02938; see ADMMPruning for the real one) in `iterations`, of which all but two tighten
    the mask: enough to rank layers, patterns and sparsities, since the weights that stay make up for most of the error.
    """

    def __init__(self, gram: Gram, iterations: int, weigh_outputs: bool) -> None:
        """weigh_outputs: whether the mask looks at the importance of outputs, as the pruner will or will not."""
        self.iterations, self.weigh_outputs = iterations, weigh_outputs
        self.moments = gram.matrix / gram.tokens
        norms = self.moments.diagonal().sqrt()
        self.dead = norms == 0
        self.norms = torch.where(self.dead, 1.0, norms)
        self.a = self.moments / torch.outer(self.norms, self.norms)
        self.a.diagonal().add_(DAMPENING * float(self.a.diagonal().mean()))
        self.inverse = torch.linalg.inv(self.a + RHO * torch.eye(len(self.a), device=norms.device))

    def run(
        self,
        weight: torch.Tensor,
        kept: torch.Tensor,
        structure: MaskStructure,
        sparsity: float,
        importance: torch.Tensor,
    ) -> Outcome:
        """weight f32 [out, in], kept bool [out, in], importance f32 [out]."""
        pruned, mask = self._prune(weight, kept, structure, sparsity, importance)
        change = pruned - weight
        error = (((change @ self.moments) * change).sum(dim=1) * importance).sum()
        blocks = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 4)).unflatten(1, (-1, 4)).any(2)
        return Outcome(float(error), float(mask.float().mean()), float(blocks.float().mean()))

    def _prune(
        self,
        weight: torch.Tensor,
        kept: torch.Tensor,
        structure: MaskStructure,
        sparsity: float,
        importance: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # An output of no importance at all would still keep its best weights.
        counts = importance.clamp_min(LEAST * float(importance.mean())).unsqueeze(1)
        alive = kept & ~self.dead
        w = weight * self.norms
        target = w @ self.a
        u = torch.zeros_like(w)
        mask = alive
        ramp = max(1, self.iterations - 2)
        for step in range(self.iterations):
            if step < ramp:
                due = sparsity * (1 - (1 - (step + 1) / ramp) ** 3)
                scores = (w + u).square_()
                if self.weigh_outputs:
                    scores *= counts
                scores.masked_fill_(~alive, -1.0)
                mask = structure.mask(scores, due) & alive
            z = (w + u).masked_fill_(~mask, 0)
            u = u + w - z
            w = (target + RHO * (z - u)) @ self.inverse
        return (w + u).masked_fill_(~mask, 0) / self.norms, mask


def curve(sparsities: Sequence[float], errors: Sequence[float], at: Sequence[float]) -> list[float]:
    """Errors at other sparsities: their logarithms go in straight lines between those measured, and on beyond them."""
    x = torch.tensor(sparsities, dtype=torch.float64)
    y = torch.tensor(errors, dtype=torch.float64).clamp_min(1e-300).log()
    wanted = torch.tensor(at, dtype=torch.float64)
    if len(x) == 1:
        return [float(y.exp())] * len(wanted)
    left = (torch.searchsorted(x, wanted, right=True) - 1).clamp(0, len(x) - 2)
    slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
    found: list[float] = (y[left] + slope * (wanted - x[left])).exp().tolist()
    return found
