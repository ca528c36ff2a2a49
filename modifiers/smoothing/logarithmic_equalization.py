"""Logarithmic activation equalization: squeeze the activations' range to about its logarithm."""

from __future__ import annotations

import torch

from .norm_smoothing import _NormSmoothing


class LogarithmicEqualization(_NormSmoothing):
    """LAE (FPTQ, Li et al. 2023, arXiv 2308.15987, equation 3): s_j = r_j / log2(2 + r_j), r_j = max|X_j|.

    s is at least 0.01, so that a channel that is nearly always zero is not blown up.
    """

    def scale(self, activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (activations / torch.log2(2 + activations)).clamp_min(1e-2)
