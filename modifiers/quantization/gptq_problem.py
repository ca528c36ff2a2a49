"""GPTQ's problem for all Linears that read one input, and the steps that solve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..hessian import Gram, inverse_factor
from ..precision import fast_float32
from .observers import weight_scale
from .rounding import BLOCK, eliminate, refit_scales, sweep
from .schemes import WeightArgs

if TYPE_CHECKING:
    from ..blocks import Observer


@dataclass(frozen=True)
class Problem:
    """What Linears that read the same input share."""

    importance: torch.Tensor  # f32 [in]: the mean square of each input
    damped: torch.Tensor  # f32 [in, in]: X^T X, dampened
    upper: torch.Tensor  # chol(damped^-1), of the columns in `order`
    order: torch.Tensor | None

    @classmethod
    def of(cls, gram: Gram, dampening_frac: float, reorder: bool) -> Problem:
        """reorder: columns with the largest inputs are rounded first. ModelError when the inputs are not finite."""
        matrix = gram.matrix
        order = matrix.diagonal().argsort(descending=True, stable=True) if reorder else None
        ordered = matrix if order is None else matrix[order][:, order]
        factor = inverse_factor(ordered, dampening_frac)
        damped = matrix.clone()
        damped.diagonal()[damped.diagonal() == 0] = 1.0  # as `inverse_factor` takes dead inputs
        damped.diagonal().add_(factor.dampening * float(matrix.diagonal().mean()))
        return cls(matrix.diagonal() / gram.tokens, damped, factor.upper, order)

    def solve(
        self,
        weight: torch.Tensor,
        kept: torch.Tensor,
        group_size: int,
        args: WeightArgs,
        *,
        block_size: int = BLOCK,
        sweeps: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers [out, in] and scales [out, groups] of a weight f32 [out, in]; 0 where `kept` is False.

        Rows do not depend on each other.
        """
        with fast_float32():
            scale = weight_scale(weight, group_size, args, self.importance)
            q = eliminate(weight, kept, scale, self.upper, args.num_bits, block_size, self.order)
            for _ in range(sweeps):
                scale = refit_scales(q, weight, scale, self.damped)
                q = sweep(q, weight, kept, scale, self.damped, args.num_bits)
        return q, scale


def evenly(gram: Gram) -> Observer:
    """Add tokens cut to the median length of their batch.

    A few tokens with huge activations (Sun et al. 2024, arXiv 2402.17762) would own the Gram matrix, and its dampening
    with it, yet an error in them is divided by their size again at the next norm.
    """

    def observe(x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        lengths = rows.norm(dim=1, keepdim=True)
        gram.add(rows * (lengths.median() / lengths.clamp_min(1e-30)).clamp_max(1))

    return observe
