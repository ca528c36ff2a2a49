"""Observers: scales from weights and from calibration inputs."""

from __future__ import annotations

import torch
from torch import nn

from .layer import EPSILON, INT8, LayerQuantization, dequantize_weight, quantize_weight
from .schemes import ConfigGroup, WeightArgs


class MinMax:
    """Observer of a Linear's input: its smallest and largest value over the calibration."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def add(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low = min(self.low, float(low))  # 0 must be on the grid, so it always is in the range
        self.high = max(self.high, float(high))

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Asymmetric int8 scale f32 [1] and zero-point i32 [1], as compressed-tensors' calculate_qparams."""
        low, high = torch.tensor([self.low]), torch.tensor([self.high])
        scale = (high - low) / (INT8[1] - INT8[0])
        scale = torch.where(scale == 0, EPSILON, scale)
        zero_point = (INT8[0] - low / scale).clamp(*INT8).round()
        return scale, zero_point.to(torch.int32)


def weight_scale(weight: torch.Tensor, group_size: int, args: WeightArgs) -> torch.Tensor:
    """The scales of a weight f32 [out, in]: f32 [out, groups], groups = in / group_size (0: one group).

    minmax: amax / ((2^bits - 1) / 2), as compressed-tensors'. mse: of 100 fractions of that down to a fifth, the one
    with the least squared error.
    """
    groups = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1])
    scale = groups.abs().amax(dim=2) / ((2**args.num_bits - 1) / 2)
    scale = torch.where(scale == 0, EPSILON, scale)
    return scale if args.observer == "minmax" else _least_error(weight, scale, args.num_bits)


def _least_error(weight: torch.Tensor, widest: torch.Tensor, bits: int) -> torch.Tensor:
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)
    for percent in range(100, 20, -1):
        scale = widest * (percent / 100)
        error = (
            dequantize_weight(quantize_weight(weight, scale, bits), scale).sub_(weight).square_()
        )
        total = error.reshape(*widest.shape, -1).sum(dim=2)
        better = total < least
        best = torch.where(better, scale, best)
        least = torch.where(better, total, least)
    return best


def round_linear(
    linear: nn.Linear, scheme: ConfigGroup, scale: torch.Tensor, inputs: MinMax | None
) -> LayerQuantization:
    """Put a Linear's weight on the grid of `scale` [out, groups], in place, and say how; a zero stays exactly 0.

    inputs: the observer of its input, where that is static.
    """
    weight = linear.weight.detach().float()
    q = quantize_weight(weight, scale, scheme.weights.num_bits)
    linear.weight.data.copy_(dequantize_weight(q, scale))
    activations = scheme.input_activations
    input_scale, zero_point = inputs.qparams() if inputs else (None, None)
    return LayerQuantization(
        module=linear,
        scheme=scheme.name,
        weight_bits=scheme.weights.num_bits,
        group_size=scheme.weights.group_size or 0,
        scale=scale,
        input_bits=activations.num_bits if activations else None,
        input_dynamic=activations.dynamic if activations else True,
        input_scale=input_scale,
        input_zero_point=zero_point,
    )
