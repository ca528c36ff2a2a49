"""An observer of what a Linear reads: the range of each channel, and a sample of tokens."""

from __future__ import annotations

import torch


class Inputs:
    """Observer of a Linear's input [batch, length, width]: the range of each channel, and some tokens.

    quota: how many tokens of each batch to keep, drawn with `seed`.
    """

    def __init__(self, quota: int, seed: int) -> None:
        self.low = torch.zeros(0)
        self.high = torch.zeros(0)
        self._quota = quota
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        low, high = torch.aminmax(tokens, dim=0)
        seen = self.low.numel() > 0
        self.low = torch.minimum(self.low, low.float()) if seen else low.float()
        self.high = torch.maximum(self.high, high.float()) if seen else high.float()
        drawn = torch.randperm(tokens.shape[0], generator=self._generator)[: self._quota]
        self._kept.append(tokens[drawn.to(tokens.device)].float())

    @property
    def largest(self) -> torch.Tensor:
        """max |X_j| of each input channel, f32 [width]."""
        return torch.maximum(self.high, -self.low)

    @property
    def tokens(self) -> torch.Tensor:
        """f32 [tokens, width]."""
        return torch.cat(self._kept)
