"""How one Linear is quantized: scheme, scales, and the hook that fake-quantizes its input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

INT8 = (-128, 127)
EPSILON = torch.finfo(torch.float32).eps  # stands for a scale of 0, as in compressed-tensors


@dataclass
class LayerQuantization:
    """The quantization of one Linear [out, in]; its weight holds `q * scale`.

    scale: f32 [out, groups], groups = in / group_size, or 1 when group_size is 0 (per output channel); those of several
    groups are exact in float16 (`half_exact`).
    input_scale f32 [1] and input_zero_point i32 [1]: static activations only.
    """

    module: nn.Linear = field(repr=False, compare=False)
    scheme: str
    weight_bits: int
    group_size: int
    scale: torch.Tensor
    input_bits: int | None = None
    input_dynamic: bool = True
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None
    _handle: RemovableHandle | None = field(default=None, repr=False, compare=False)

    @property
    def quantized_weight(self) -> torch.Tensor:
        """int8 [out, in]: the integers behind the weight; 4-bit ones are in [-8, 7]."""
        weight = self.module.weight.detach().float()
        return quantize_weight(weight, self.scale, self.weight_bits).to(torch.int8)

    def state_dict(self) -> dict[str, Any]:
        names = ("scheme", "weight_bits", "group_size", "scale", "input_bits", "input_dynamic")
        return {name: getattr(self, name) for name in (*names, "input_scale", "input_zero_point")}

    def to(self, device: torch.device) -> None:
        """Move the scales, as the module is moved."""
        self.scale = self.scale.to(device)
        if self.input_scale is not None and self.input_zero_point is not None:
            self.input_scale = self.input_scale.to(device)
            self.input_zero_point = self.input_zero_point.to(device)

    @classmethod
    def from_state(cls, module: nn.Module, state: dict[str, Any]) -> LayerQuantization:
        assert isinstance(module, nn.Linear)
        return cls(module=module, **state)


def half_exact(scale: torch.Tensor) -> torch.Tensor:
    """Scales f32 [out, groups] rounded to float16, in which the engine keeps a matrix's if all are exact in it.

    One per row stays as it is, where half of it would save nothing, and one that would become 0 or infinite.
    """
    if scale.shape[1] == 1:
        return scale
    half = scale.half().float()
    return torch.where((half > 0) & half.isfinite(), half, scale)


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`clamp(round_half_even(weight / scale))` as floats; weight [out, in], scale [out, groups]."""
    limit = 2 ** (bits - 1)
    groups = weight.reshape(weight.shape[0], scale.shape[1], -1)
    q = (groups / scale.unsqueeze(2)).round_().clamp_(-limit, limit - 1)
    return q.reshape(weight.shape)


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`q * scale`; q [out, in], scale [out, groups]."""
    return (q.reshape(q.shape[0], scale.shape[1], -1) * scale.unsqueeze(2)).reshape(q.shape)


def fake_quantize_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Symmetric int8 per token (row of the last axis): scale = amax / 127.5, q = clamp(round(x / scale))."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, EPSILON, scale)
    return (x / scale).round_().clamp_(*INT8).mul_(scale)


def fake_quantize_static(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Asymmetric int8 per tensor: q = clamp(round(x / scale) + zero_point), value = (q - zero_point) * scale."""
    scale, zero_point = scale.to(x.device), zero_point.to(x.device)
    q = (x / scale).round_().add_(zero_point).clamp_(*INT8)
    return q.sub_(zero_point).mul_(scale)


def attach(layer: LayerQuantization) -> None:
    """Fake-quantize the module's input from now on, if the scheme quantizes activations; idempotent."""
    detach(layer)
    if layer.input_bits is not None:
        layer._handle = layer.module.register_forward_pre_hook(_InputQuantizer(layer))


def detach(layer: LayerQuantization) -> None:
    """Take the hook away."""
    if layer._handle is not None:
        layer._handle.remove()
        layer._handle = None


class _InputQuantizer:
    """The forward pre-hook of a quantized Linear; gradients pass straight through (Bengio 2013, arXiv 1308.3432)."""

    def __init__(self, layer: LayerQuantization) -> None:
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        x = args[0]
        layer = self.layer
        with torch.no_grad():
            if layer.input_dynamic:
                value = fake_quantize_dynamic(x)
            else:
                assert layer.input_scale is not None
                assert layer.input_zero_point is not None
                value = fake_quantize_static(x, layer.input_scale, layer.input_zero_point)
        if torch.is_grad_enabled() and x.requires_grad:
            value = x + (value - x).detach()
        return (value, *args[1:])
