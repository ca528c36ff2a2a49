"""`N:M`: N kept of every M consecutive inputs of a row."""

from __future__ import annotations

import re

import torch

from ..mask_structure import MaskStructure, keep_highest


class NOfM(MaskStructure):
    """N kept of every M consecutive inputs of a row: 4:16 is 75 % sparse. Wide windows cost less accuracy.

    At another sparsity than its own (a ramp on the way there) it removes round(sparsity * M) of every M.
    """

    usage = "N:M (N kept of every M inputs, such as 2:4)"
    local = True

    def __init__(self, text: str, n: int, m: int) -> None:
        super().__init__(text)
        self.n = n
        self.columns = self.step = m

    @classmethod
    def named(cls, text: str) -> NOfM | None:
        match = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", text, re.ASCII)
        if match is None or int(match[1]) >= int(match[2]):
            return None
        return cls(text, int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.columns

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        groups = scores.reshape(-1, self.columns)
        return keep_highest(groups, round(sparsity * self.columns)).reshape(scores.shape)
