"""AWQ: give the weights that meet large activations more of the integer grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from ..quantization.schemes import Preset, preset
from .output_error import Name, OutputError
from .pair_smoothing import _PairSmoothing

if TYPE_CHECKING:
    from torch import nn

    from ..quantization.inputs import Inputs
    from .pairs import Pair


class AWQ(_PairSmoothing):
    """Activation-aware weight quantization (Lin et al. 2023, arXiv 2306.00978), as the scaling that it is.

    At every exact pair s = a^r for r in `n_grid` steps from 0 to 1 (with duo_scaling a^r / w^(1-r)), the one that
    leaves the Linears' outputs nearest to what they were once weights are rounded as `scheme`, `group_size` and
    `observer` say; the rounding itself is left to the Quantization or GPTQ that follows. a_j is the mean |X_j| of a
    channel, w_j the mean |W_j| relative to the largest weight of its group. Here each token has its norm taken out of
    a, and counts by its relative error: the huge tokens of an attention sink would decide alone otherwise.
    """

    scheme: Preset = "W4A16"
    """The scheme to come."""
    group_size: int | None = Field(default=None, ge=8)
    """Inputs that will share a weight's scale; 4-bit: 128 if not given."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    """How the weights' scales are found while searching; mse tries 80 for each candidate and takes as much longer."""
    n_grid: int = Field(default=20, ge=1)
    """How many steps of r to try."""
    duo_scaling: bool | Literal["both"] = True
    """Whether the scale depends on weights too; both: try either."""

    def sources(self) -> Literal["norms", "all"]:
        return "all"

    def choose(
        self, pair: Pair, linears: list[nn.Linear], inputs: Inputs
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        scheme = preset(self.scheme, [], group_size=self.group_size, observer=self.observer)
        error = OutputError(pair, linears, inputs, scheme)  # checks the group size too
        tokens = inputs.tokens
        norms = tokens.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        a = pair.gather((tokens / norms).abs().mean(dim=0))
        size = scheme.weights.group_size or tokens.shape[1]
        w = pair.gather(relative_weights([linear.weight.detach() for linear in linears], size))
        candidates: dict[Name, torch.Tensor] = {"none": torch.ones_like(a)}
        for duo in (True, False) if self.duo_scaling == "both" else (self.duo_scaling,):
            for step in range(self.n_grid + 1):
                r = step / self.n_grid
                key = f"{r:g}{' without weights' if not duo and self.duo_scaling else ''}"
                candidates[key] = awq_scale(a, w if duo else None, r)
        name, least = error.best(candidates)
        notes = {"ratio": name, "error": least, "error_before": error(candidates["none"])}
        return candidates[name], notes


def awq_scale(
    activations: torch.Tensor, weights: torch.Tensor | None, ratio: float
) -> torch.Tensor:
    """a^r (/ w^(1-r)), at least 1e-4, divided by the geometric mean of its largest and smallest."""
    scale = activations**ratio
    if weights is not None:
        scale = scale / (weights ** (1 - ratio) + 1e-4)
    scale = scale.clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def relative_weights(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """The mean over all rows of |W_ij| relative to the largest of its group, f32 [in]; weights [out, in] each."""
    rows = torch.cat(weights).float().abs()
    groups = rows.reshape(rows.shape[0], -1, group_size)
    relative = groups / groups.amax(dim=2, keepdim=True).clamp_min(1e-12)
    return relative.reshape(rows.shape).mean(dim=0)
