"""What rounding will cost the Linears of a pair, for any scale between them: tried on tokens of the calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..quantization.layer import (
    dequantize_weight,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize_weight,
)
from ..quantization.observers import MinMax, weight_scale

if TYPE_CHECKING:
    from torch import nn

    from ..quantization.inputs import Inputs
    from ..quantization.schemes import ConfigGroup
    from .pairs import Pair

Name = float | str
"""What a candidate is called in the report: a strength, or `none`."""
TOKENS = 512  # on which each scale is tried


class OutputError:
    """The relative squared error per token, averaged over tokens and over the Linears that will be quantized.

    Relative, because a token of an attention sink is a thousand times larger than others, and a squared error summed
    over tokens would look at nothing else.
    """

    def __init__(
        self, pair: Pair, linears: list[nn.Linear], inputs: Inputs, scheme: ConfigGroup
    ) -> None:
        self.pair = pair
        self.scheme = scheme
        self.low, self.high = inputs.low, inputs.high
        self.tokens = inputs.tokens
        self.tokens = self.tokens[:: max(1, len(self.tokens) // TOKENS)]
        self.weights = [linear.weight.detach().float() for linear in linears]
        for weight in self.weights:
            scheme.group_size_for(f"a Linear fed by {pair.name}", weight.shape[1])
        self.outputs = [self.tokens @ weight.T for weight in self.weights]
        tiny = torch.finfo(torch.float32).tiny
        self.energies = [y.square().sum(dim=1).clamp_min(tiny) for y in self.outputs]

    def __call__(self, scale: torch.Tensor) -> float:
        """The error when the source's channels are divided by `scale` [width]; 0.01 is 10 % of a token's norm."""
        columns = self.pair.spread(scale)
        x = self._round_inputs(columns)
        total = 0.0
        for weight, y, energy in zip(self.weights, self.outputs, self.energies, strict=True):
            scaled = weight * columns
            args = self.scheme.weights
            steps = weight_scale(scaled, args.group_size or 0, args)
            q = dequantize_weight(quantize_weight(scaled, steps, args.num_bits), steps)
            total += float(((x @ q.T).sub_(y).square_().sum(dim=1) / energy).mean())
        return total / len(self.weights)

    def best(self, candidates: Mapping[Name, torch.Tensor]) -> tuple[Name, float]:
        """The name of the scale with the least error, and that error."""
        errors = {name: self(scale) for name, scale in candidates.items()}
        name = min(errors, key=lambda key: errors[key])
        return name, errors[name]

    def _round_inputs(self, columns: torch.Tensor) -> torch.Tensor:
        x = self.tokens / columns
        activations = self.scheme.input_activations
        if activations is None:
            return x
        if activations.dynamic:
            return fake_quantize_dynamic(x)
        observer = MinMax()
        observer.add(torch.stack([self.low, self.high]) / columns)
        scale, zero_point = observer.qparams()
        return fake_quantize_static(x, scale, zero_point)
