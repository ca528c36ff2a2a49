"""Quantization-aware training of one Linear: it computes with integers' values, gradients pass straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from ...errors import ModelError
from .layer import (
    LayerQuantization,
    dequantize_weight,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize_weight,
)
from .observers import MinMax, round_linear, weight_scale
from .schemes import ConfigGroup


class AwareLinear:
    """A Linear [out, in] whose forward rounds weight and input to their grids; its parameter stays in floating point.

    The gradient of rounding is taken as 1 (straight-through, Bengio 2013, arXiv 1308.3432), also where a value is
    clipped. `attach` takes the module's forward over, `detach` gives it back.
    """

    def __init__(self, name: str, module: nn.Linear, scheme: ConfigGroup) -> None:
        self.module = module
        self.scheme = scheme
        self.name = name
        self.group_size = scheme.group_size_for(name, module.weight.shape[1])
        self.scale: torch.Tensor | None = None
        self.inputs = MinMax()
        self.observing = True

    def observe_weight(self) -> None:
        """Take the scales from the weight as it is now."""
        weight = self.module.weight.detach().float()
        self.scale = weight_scale(weight, self.group_size, self.scheme.weights)

    def attach(self) -> None:
        self.module.forward = self._forward  # type: ignore[assignment, method-assign]

    def detach(self) -> None:
        self.module.__dict__.pop("forward", None)

    def integers(self) -> LayerQuantization:
        """Put the weight on its grid, in place, and say how. A zero stays exactly zero."""
        activations = self.scheme.input_activations
        static = activations is not None and not activations.dynamic
        return round_linear(
            self.module, self.scheme, self._scale(), self.inputs if static else None
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "low": self.inputs.low,
            "high": self.inputs.high,
            "observing": self.observing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state; attached if it was."""
        self.scale = state["scale"]
        if self.scale is not None:
            self.scale = self.scale.to(self.module.weight.device)
            self.attach()
        self.inputs.low, self.inputs.high = state["low"], state["high"]
        self.observing = state["observing"]

    def _scale(self) -> torch.Tensor:
        assert self.scale is not None  # observed before the first forward
        return self.scale

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        with torch.no_grad():
            q = quantize_weight(weight.float(), self._scale(), self.scheme.weights.num_bits)
            rounded = dequantize_weight(q, self._scale()).to(weight.dtype)
            value = self._quantize_input(x)
        return nn.functional.linear(
            x if value is x else _straight_through(x, value),
            _straight_through(weight, rounded),
            self.module.bias,
        )

    def _quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        activations = self.scheme.input_activations
        if activations is None:
            return x
        if activations.dynamic:
            return fake_quantize_dynamic(x)
        if self.observing:
            self.inputs.add(x)
        elif self.inputs.low == self.inputs.high:
            raise ModelError(
                f"{self.name}: freeze_observer comes before its input was ever seen; freeze later"
            )
        scale, zero_point = self.inputs.qparams()
        return fake_quantize_static(x, scale, zero_point).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()  # an input itself can't be returned as a new value

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _straight_through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, exactly, with the gradient of `x`."""
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return, no-untyped-call]
