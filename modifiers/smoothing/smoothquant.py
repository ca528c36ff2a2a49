"""SmoothQuant: share the activations' outliers with the weights."""

from __future__ import annotations

import torch
from pydantic import Field

from .norm_smoothing import _NormSmoothing


class SmoothQuant(_NormSmoothing):
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4): s_j = max|X_j|^a / max|W_j|^(1-a)."""

    smoothing_strength: float = Field(default=0.5, ge=0, le=1)
    """a: 0 leaves the difficulty to the activations, 1 moves all of it into the weights."""

    def scale(self, activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        alpha = self.smoothing_strength
        return activations.clamp_min(1e-5) ** alpha / weights.clamp_min(1e-5) ** (1 - alpha)
