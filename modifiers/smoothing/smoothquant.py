"""SmoothQuant: share the activations' outliers with the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from ..quantization.noise_model import NoiseModel
from ..quantization.schemes import Preset, preset
from .output_error import Name, OutputError
from .pair_smoothing import _PairSmoothing, weight_maxima

if TYPE_CHECKING:
    from torch import nn

    from ..quantization.inputs import Inputs
    from .pairs import Pair

GRID = [step / 10 for step in range(11)]
MILD = (0.3, 0.5)
RARE = 0.01  # of the median channel's largest input


class SmoothQuant(_PairSmoothing):
    """SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4): s_j = max|X_j|^a / max|W_j|^(1-a).

    With a number for `smoothing_strength`, at the pairs of a norm and the Linears that read it. With `auto` at every
    pair that is exact (up_proj and down_proj, v_proj and o_proj too): of no smoothing, the strengths 0, 0.1, ... 1, and
    two by root mean squares instead of maxima, with weights and without, the one that leaves the Linears' outputs
    nearest to what they were once inputs and weights are rounded as `scheme`, `dynamic` and `group_size` say (those of
    the Quantization to come). From there gradient descent refines each channel's scale on a model of the rounding
    noise (`quantization/noise_model.py`), and the result is taken if it rounds better. Each token counts by its
    relative error, so that the few huge tokens of an attention sink do not decide.
    """

    smoothing_strength: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    """a: 0 leaves the difficulty to the activations, 1 moves all into the weights; auto: the best for each pair."""
    scheme: Preset = "W8A8"
    """With auto: the scheme to come."""
    dynamic: bool = True
    """With auto: whether int8 inputs will get a scale per token (true) or one from calibration (false)."""
    group_size: int | None = Field(default=None, ge=8)
    """With auto: inputs that will share a weight's scale, as in Quantization."""

    @model_validator(mode="after")
    def _check_scheme(self) -> SmoothQuant:
        given = self.model_fields_set & {"scheme", "dynamic", "group_size"}
        if self.smoothing_strength != "auto" and given:
            raise ValueError(f"{', '.join(sorted(given))} needs smoothing_strength: auto")
        return self

    def sources(self) -> Literal["norms", "all"]:
        return "all" if self.smoothing_strength == "auto" else "norms"

    def choose(
        self, pair: Pair, linears: list[nn.Linear], inputs: Inputs
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        activations = pair.gather(inputs.largest)
        weights = pair.gather(weight_maxima(pair.consumers.values()))
        if self.smoothing_strength != "auto":
            return smoothing_scale(activations, weights, self.smoothing_strength), {}
        # a channel that the calibration hardly used is not blown up as far as that would allow
        activations = activations.clamp_min(float(activations.median()) * RARE)
        scheme = preset(self.scheme, [], dynamic=self.dynamic, group_size=self.group_size)
        error = OutputError(pair, linears, inputs, scheme)
        candidates: dict[Name, torch.Tensor] = {"none": torch.ones_like(activations)}
        for strength in GRID:
            candidates[strength] = smoothing_scale(activations, weights, strength)
        rms = pair.gather(_rms(inputs.tokens))
        rms = rms.clamp_min(max(float(rms.median()) * RARE, 1e-5))
        norms = pair.gather(torch.cat([w.weight for w in linears]).detach().float().norm(dim=0))
        for strength in MILD:
            candidates[f"rms {strength}"] = smoothing_scale(rms, norms, strength)
            candidates[f"input {strength}"] = rms**strength
        name, least = error.best(candidates)
        model = NoiseModel(inputs, [linear.weight.detach().float() for linear in linears], scheme)
        refined = model.descend(candidates[name], pair.spread)
        _, after = error.best({"refined": refined})
        notes = {
            "strength": name,
            "refined": after < least,
            "error": min(after, least),
            "error_before": error(candidates["none"]),
        }
        return refined if after < least else candidates[name], notes


def _rms(tokens: torch.Tensor) -> torch.Tensor:
    """The root mean square of each channel of tokens [tokens, width], each token divided by its own."""
    shares = tokens.square()
    return (shares / shares.mean(dim=1, keepdim=True).clamp_min(1e-24)).mean(dim=0).sqrt()


def smoothing_scale(
    activations: torch.Tensor, weights: torch.Tensor, strength: float
) -> torch.Tensor:
    """Equation 4 for a = `strength`, max|X_j| = `activations` and max|W_j| = `weights`."""
    a, w = activations.clamp_min(1e-5), weights.clamp_min(1e-5)
    return a**strength / w ** (1 - strength)
