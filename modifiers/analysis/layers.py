"""Every Linear of a model by what quantizing it alone would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import ModelError, TargetError
from ...progress import Progress
from ..blocks import Stream
from ..precision import fast_float32
from ..quantization.schemes import ConfigGroup
from ..quantization.sensitivity import input_range, noise, output_error
from ..quantization.skip import Score


@dataclass(frozen=True)
class LayerCost:
    """One Linear: its size, and the scores of `quantization/sensitivity.py`."""

    name: str
    weights: int
    input_range: float
    output_error: float
    noise: float

    def score(self, by: Score) -> float:
        return float(getattr(self, by))


@torch.no_grad()
def layer_costs(
    model: nn.Module,
    calibration: torch.Tensor,
    scheme: ConfigGroup,
    progress: Progress | None = None,
    ignore: Sequence[str] = (),
) -> list[LayerCost]:
    """All Linears in the decoder blocks that `scheme` targets, in the model's order; the model stays as it is.

    calibration: int64 [samples, length]. Raises ModelError when the scheme's groups do not divide a layer or a score is
    no finite number, TargetError when no decoder block has a Linear that is meant.
    """
    found: list[LayerCost] = []
    stream = Stream(model, calibration)
    with fast_float32():
        for index in range(len(stream.blocks)):
            block = stream.block(index)
            linears = block.linears(scheme.targets, ignore)
            schemes = dict.fromkeys(linears, scheme)
            for name, linear in linears.items():
                scheme.group_size_for(name, linear.weight.shape[1])
            ranges = input_range(block, schemes)
            errors = output_error(block, schemes)
            noises = noise(block, schemes)
            for name, linear in linears.items():
                scores = ranges[name], errors[name], noises[name]
                if not all(map(math.isfinite, scores)):
                    raise ModelError(
                        f"{name}: its inputs or weights are not finite; check the model and its data type"
                    )
                found.append(LayerCost(name, linear.weight.numel(), *scores))
            if progress:
                progress("analyze", index + 1, len(stream.blocks))
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise TargetError(
            f"no decoder block has a Linear to quantize; the model's modules are {', '.join(kinds)}"
        )
    return found


def ranked(costs: Sequence[LayerCost], by: Score) -> list[LayerCost]:
    """The costliest first."""
    return sorted(costs, key=lambda cost: -cost.score(by))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without the beginning that all share up to a dot: `model.layers.3.mlp.up_proj` as `3.mlp.up_proj`."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return {name: ".".join(part[shared:]) for name, part in zip(names, parts, strict=True)}
