"""Observers: scales from weights and from calibration inputs."""

from __future__ import annotations

import torch
from torch import nn

from .layer import (
    EPSILON,
    INT8,
    LayerQuantization,
    dequantize_weight,
    half_exact,
    quantize_weight,
)
from .schemes import ConfigGroup, WeightArgs

PERCENTILE = 99.9  # of the absolute weights that share a scale


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
        """Asymmetric int8 scale f32 [1] and zero-point i32 [1]."""
        return qparams(self.low, self.high)


def qparams(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale f32 [1] and zero-point i32 [1] of int8 over [low, high], as compressed-tensors' calculate_qparams."""
    lowest, highest = torch.tensor([low]), torch.tensor([high])
    scale = (highest - lowest) / (INT8[1] - INT8[0])
    scale = torch.where(scale == 0, EPSILON, scale)
    zero_point = (INT8[0] - lowest / scale).clamp(*INT8).round()
    return scale, zero_point.to(torch.int32)


def weight_scale(
    weight: torch.Tensor,
    group_size: int,
    args: WeightArgs,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales of a weight f32 [out, in]: f32 [out, groups], groups = in / group_size (0: one group).

    minmax: amax / ((2^bits - 1) / 2), as compressed-tensors'. percentile: the same, of the 99.9th percentile. mse: of
    80 fractions of minmax's down to a fifth, the one with the least squared error. imatrix_mse: the same, each
    column's error counting `importance` [in] times: the mean square of the input that it meets. All are `half_exact`.
    """
    columns = weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, group_size or columns).abs()
    clips = args.observer == "percentile"
    largest = torch.quantile(groups, PERCENTILE / 100, dim=2) if clips else groups.amax(dim=2)
    scale = largest / ((2**args.num_bits - 1) / 2)
    scale = half_exact(torch.where(scale == 0, EPSILON, scale))
    if args.observer == "mse":
        return _least_error(weight, scale, args.num_bits, torch.ones(columns).to(weight))
    if args.observer == "imatrix_mse":
        assert importance is not None
        return _least_error(weight, scale, args.num_bits, importance.to(weight))
    return scale


def _least_error(
    weight: torch.Tensor, widest: torch.Tensor, bits: int, importance: torch.Tensor
) -> torch.Tensor:
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)
    for percent in range(100, 20, -1):
        scale = half_exact(widest * (percent / 100))
        error = dequantize_weight(quantize_weight(weight, scale, bits), scale).sub_(weight)
        total = error.square_().mul_(importance).reshape(*widest.shape, -1).sum(dim=2)
        better = total < least
        best = torch.where(better, scale, best)
        least = torch.where(better, total, least)
    return best


class Importance:
    """Observer of a Linear's input: the mean square of each column over the calibration (llama.cpp's imatrix)."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum = self._sum + rows.square().sum(dim=0)
        self._tokens += rows.shape[0]

    @property
    def mean(self) -> torch.Tensor:
        """f32 [in]."""
        return torch.as_tensor(self._sum) / self._tokens


def round_linear(
    linear: nn.Linear, scheme: ConfigGroup, scale: torch.Tensor, inputs: MinMax | None
) -> LayerQuantization:
    """Round a Linear's weight to the nearest on the grid of `scale` [out, groups], in place, and say how.

    A zero stays exactly 0. inputs: the observer of its input, where that is static.
    """
    weight = linear.weight.detach().float()
    q = quantize_weight(weight, scale, scheme.weights.num_bits)
    return set_integers(linear, scheme, q, scale, inputs)


def set_integers(
    linear: nn.Linear,
    scheme: ConfigGroup,
    q: torch.Tensor,
    scale: torch.Tensor,
    inputs: MinMax | None,
) -> LayerQuantization:
    """Give a Linear the weight `q * scale`, in place; q integers [out, in], scale [out, groups]."""
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
