"""What quantizing one Linear alone would cost: three scores, measured on a block that computes in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .histogram import static_observers
from .inputs import Inputs
from .layer import attach, detach
from .noise_model import NoiseModel
from .observers import Importance, MinMax, round_linear, weight_scale
from .skip import Score

if TYPE_CHECKING:
    from ..blocks import Block
    from .schemes import ConfigGroup

TRIED = 2  # batches of the calibration on which a block is run for each of its Linears
TOKENS = 1024  # for the noise model


def scores(by: Score, block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
    """The score of each of the block's Linears that have a scheme: the higher, the more quantizing it costs."""
    measure = {"input_range": input_range, "output_error": output_error, "noise": noise}[by]
    return measure(block, schemes)


def input_range(block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
    """max - min of the input over the calibration."""
    ranges = {name: MinMax() for name in schemes}
    block.run({name: observer.add for name, observer in ranges.items()})
    return {name: observer.high - observer.low for name, observer in ranges.items()}


def output_error(block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
    """The squared error of the block's output, relative to the output, when that Linear alone is rounded.

    Weight and input are rounded as the scheme says. The error is taken where it counts, in the stream that the next
    block reads, of each token relative to its own norm, and averaged over tokens: summed squares would show nothing
    but the few huge tokens of an attention sink.
    """
    static = static_observers(schemes)
    block.run({name: observer.add for name, observer in static.items()})
    before = block.outputs(batches=TRIED)
    energies = [y.float().square().sum(dim=-1) for y in before]
    tiny = torch.finfo(torch.float32).tiny
    found = {}
    for name, scheme in schemes.items():
        after = _outputs_without(block, name, scheme, static.get(name))
        errors = [
            (y - x).float().square().sum(dim=-1) / energy.clamp_min(tiny)
            for x, y, energy in zip(before, after, energies, strict=True)
        ]
        found[name] = float(torch.cat([error.flatten() for error in errors]).mean())
    return found


def noise(block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
    """The squared error of the Linear's own output as `NoiseModel` expects it, relative to the output.

    The noise of the weights' grid times the energy of the inputs, plus the noise of the inputs' grid times the energy
    of the weights: nothing is rounded, and the block runs once.
    """
    quota = -(-TOKENS // len(block.inputs))
    inputs = {name: Inputs(quota, seed=0) for name in schemes}
    block.run({name: observer.add for name, observer in inputs.items()})
    found = {}
    for name, scheme in schemes.items():
        weight = block.model.get_submodule(name).get_parameter("weight").detach().float()
        model = NoiseModel(inputs[name], [weight], scheme)
        found[name] = float(model(torch.ones_like(weight[0])))
    return found


def _outputs_without(
    block: Block, name: str, scheme: ConfigGroup, static: MinMax | None
) -> list[torch.Tensor]:
    """The block's outputs while one Linear is rounded; it is left as it was."""
    linear = block.model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    saved = linear.weight.detach().clone()
    weight = saved.float()
    size = scheme.group_size_for(name, weight.shape[1])
    importance = Importance()
    if scheme.weights.observer == "imatrix_mse":
        block.run({name: importance.add}, batches=TRIED)
        scale = weight_scale(weight, size, scheme.weights, importance.mean)
    else:
        scale = weight_scale(weight, size, scheme.weights)
    layer = round_linear(linear, scheme, scale, static)
    attach(layer)
    try:
        return block.outputs(batches=TRIED)
    finally:
        detach(layer)
        linear.weight.data.copy_(saved)
