"""Sensitivity: every layer is tried at several sparsities, and all end where removing more costs the loss the same."""

from __future__ import annotations

from typing import Any

import torch

from .budget import Option, spread
from .profile import Place, Share
from .survey import Survey
from .trial import curve

TRIED, FINE = (
    5,
    81,
)  # sparsities that are tried, and those between which a loss is taken to be linear


class Sensitivity(Survey):
    """Equal marginal loss: minimise the sum over layers of loss(sparsity), for a given number of weights in all.

    loss is the output error that a short ADMM leaves, each output's times how much the model's loss minds it: a
    diagonal approximation of the empirical Fisher information, which makes errors of different layers comparable. Every
    layer stays within `reach` of the sparsity asked for, since a quadratic model of the loss says little far away.

    SmolLM2-135M, ADMM, 8 of 30 blocks pruned, perplexity uniform -> this: 50 %: 26.2 -> 25.9; 70 %: 32.9 -> 29.3;
    80 %: 54.9 -> 35.3 (labels from the model's own predictions instead of the text: 70 % 29.9, 80 % 40.4).
    """

    def __init__(
        self, structure: str, sparsity: float, reach: float, samples: int, weigh_outputs: bool
    ) -> None:
        self.low, self.high = max(sparsity - reach, 0.01), min(sparsity + reach, 0.99)
        self.tried = torch.linspace(self.low, self.high, TRIED, dtype=torch.float64).tolist()
        super().__init__({structure: self.tried}, samples, weigh_outputs)

    def allocate(
        self, places: dict[str, Place], found: dict[str, Any], structure: str, sparsity: float
    ) -> dict[str, Share]:
        fine = torch.linspace(self.low, self.high, FINE, dtype=torch.float64).tolist()
        options = {}
        for name, place in places.items():
            losses = curve(self.tried, [error for error, _, _ in found[name][structure]], fine)
            options[name] = [Option(s * place.size, e) for s, e in zip(fine, losses, strict=True)]
        saved = spread(options, sparsity * sum(place.size for place in places.values()))
        return {n: Share(structure, saved[n] / place.size) for n, place in places.items()}
