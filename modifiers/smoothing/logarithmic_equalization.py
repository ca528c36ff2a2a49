"""Logarithmic activation equalization: squeeze the activations' range to about its logarithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .pair_smoothing import _PairSmoothing

if TYPE_CHECKING:
    from torch import nn

    from ..quantization.inputs import Inputs
    from .pairs import Pair


class LogarithmicEqualization(_PairSmoothing):
    """LAE (FPTQ, Li et al. 2023, arXiv 2308.15987, equation 3): s_j = r_j / log2(2 + r_j), r_j = max|X_j|.

    At the pairs of a norm and the Linears that read it. s is at least 0.01, so that a channel that is nearly always
    zero is not blown up.
    """

    def choose(
        self, pair: Pair, linears: list[nn.Linear], inputs: Inputs
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return logarithmic_scale(pair.gather(inputs.largest)), {}


def logarithmic_scale(largest: torch.Tensor) -> torch.Tensor:
    """Equation 3 for r_j = `largest` >= 0."""
    return (largest / torch.log2(2 + largest)).clamp_min(1e-2)
