"""The rounding noise of a Linear's output as a smooth function of each channel's scale, and the descent on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .inputs import Inputs
    from .schemes import ConfigGroup

    Spread = Callable[[torch.Tensor], torch.Tensor]

SHARPNESS = (
    24  # of the p-norm that stands for the largest channel: all that are near it get a gradient
)
STEPS, RATE, PART = 64, 0.05, 512  # of descent; PART tokens and rows of weights in each step


class NoiseModel:
    """Expected squared error per token, relative to the token's output, averaged over tokens and Linears.

    Rounding to a grid of step d makes an error of variance d^2 / 12, or of the value's own square where that is less.
    Errors of inputs are carried by the weights' squares and errors of weights by the inputs' squares. No rounding and
    no matrix product is done, so that a step of descent costs little more than reading some tokens.

    inputs: what the Linears read; weights f32 [out, in] of each.
    """

    def __init__(
        self, inputs: Inputs, weights: Sequence[torch.Tensor], scheme: ConfigGroup
    ) -> None:
        self.scheme = scheme
        tokens = inputs.tokens
        self.squares = tokens.square()
        self.low, self.high = inputs.low.clamp_max(0), inputs.high.clamp_min(0)
        self.weights = [weight.abs() for weight in weights]
        self.columns = [weight.square().sum(dim=0) for weight in weights]
        tiny = torch.finfo(torch.float32).tiny
        self.shares = [  # f32 [tokens]: what a squared error counts in each token, 1 / |y|^2
            1 / (tokens @ weight.T).square().sum(dim=1).clamp_min(tiny) for weight in weights
        ]
        # mean over tokens of x_j^2 / |y|^2: what a squared error of weight j costs
        self.importance = [share @ self.squares / len(share) for share in self.shares]

    def __call__(self, scale: torch.Tensor, step: int | None = None) -> torch.Tensor:
        """The expected error when inputs are divided and weights multiplied by `scale` [in] > 0; a scalar.

        step: not given, all tokens and rows; else an estimate from about PART of each, other ones at every step.
        """
        s2 = scale.square()
        total = self._input_noise(scale, s2, _part(len(self.squares), step))
        for weight, importance in zip(self.weights, self.importance, strict=True):
            rows = weight[_part(len(weight), step)]
            noise = self._weight_noise(rows * scale) * (len(weight) / len(rows))
            total = total + noise @ (importance / s2)
        return total / len(self.weights)

    def descend(self, start: torch.Tensor, spread: Spread) -> torch.Tensor:
        """The scale per source channel after Adam on the logarithm of `start` > 0, at a rate that falls to 0.

        spread: makes of it the scale per input.
        """
        with torch.enable_grad():
            logarithm = start.detach().log().requires_grad_(True)
            optimizer = torch.optim.Adam([logarithm], lr=RATE)
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
                optimizer.zero_grad()
                self(spread(logarithm.exp()), step).backward()
                optimizer.step()
        return logarithm.detach().exp()

    def _input_noise(self, scale: torch.Tensor, s2: torch.Tensor, part: slice) -> torch.Tensor:
        activations = self.scheme.input_activations
        if activations is None:
            return scale.new_zeros(())
        values = self.squares[part] / s2
        if activations.dynamic:
            variance = values.amax(dim=1, keepdim=True) / (127.5**2 * 12)
        else:
            step = (_largest(self.high / scale) + _largest(-self.low / scale)) / 255
            variance = step.square() / 12
        noise = torch.minimum(values, variance)
        parts = [
            ((noise @ (columns * s2)) * share[part]).mean()
            for columns, share in zip(self.columns, self.shares, strict=True)
        ]
        return torch.stack(parts).sum()

    def _weight_noise(self, weight: torch.Tensor) -> torch.Tensor:
        """The expected squared error of a column, summed over rows, f32 [in]; weight [out, in] >= 0."""
        args = self.scheme.weights
        groups = weight.reshape(weight.shape[0], -1, args.group_size or weight.shape[1])
        step = groups.amax(dim=2, keepdim=True) / ((2**args.num_bits - 1) / 2)
        return torch.minimum(groups.square(), step.square() / 12).sum(dim=0).reshape(-1)


def _part(count: int, step: int | None) -> slice:
    parts = 1 if step is None else max(1, count // PART)
    return slice((step or 0) % parts, None, parts)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """A smooth maximum of values >= 0, never below the true one."""
    top = values.detach().amax().clamp_min(torch.finfo(values.dtype).tiny)
    return top * (values / top).pow(SHARPNESS).sum().pow(1 / SHARPNESS)
