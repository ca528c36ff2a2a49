"""The weight of a quantized Linear while it is trained: floating point behind, its grid's values in front."""

from __future__ import annotations

import torch
from torch import nn

from ..quantization.layer import (
    LayerQuantization,
    dequantize_weight,
    half_exact,
    quantize_weight,
)


class LatentWeight:
    """Lets a quantized Linear compute with the rounded values of a latent weight f32 [out, in] that can be trained.

    The gradient of rounding is taken as 1 (straight-through, Bengio 2013, arXiv 1308.3432); that of a scale follows
    from `q * scale` (LSQ, Esser et al. 2020, arXiv 1902.08153). Scales are trained as factors, so that one learning
    rate fits all. `attach` takes the module's forward over, `detach` gives it back; the hook that rounds inputs stays.
    """

    def __init__(self, layer: LayerQuantization, mask: torch.Tensor | None) -> None:
        self.layer = layer
        self.weight = layer.module.weight.detach().float().clone().requires_grad_()
        self.log_factor = torch.zeros_like(layer.scale).requires_grad_()
        self._mask = mask

    @property
    def scale(self) -> torch.Tensor:
        """f32 [out, groups], with its graph."""
        return self.layer.scale * self.log_factor.exp()

    def attach(self) -> None:
        self.layer.module.forward = self._forward  # type: ignore[assignment, method-assign]

    def detach(self) -> None:
        self.layer.module.__dict__.pop("forward", None)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the module's weight on the grid of the trained `half_exact` scale, in place; a held zero is exactly 0."""
        scale = half_exact(self.scale.detach().clone())
        weight = self.weight if self._mask is None else self.weight.masked_fill(~self._mask, 0)
        q = quantize_weight(weight, scale, self.layer.weight_bits)
        self.layer.scale = scale
        self.layer.module.weight.data.copy_(dequantize_weight(q, scale))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale
        limit = 2 ** (self.layer.weight_bits - 1)
        steps = self.weight.reshape(*scale.shape, -1) / scale.unsqueeze(2)
        rounded = steps + (steps.detach().round().clamp(-limit, limit - 1) - steps.detach())
        weight = (rounded * scale.unsqueeze(2)).reshape(self.weight.shape)
        return nn.functional.linear(x, weight, self.layer.module.bias)
