"""Quantization schemes: the presets' names, and `config_groups` in the vocabulary of compressed-tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import ModelError

Preset = Literal["W8A8", "W8A16", "W4A16", "W4A8"]
WeightObserver = Literal["minmax", "percentile", "mse", "imatrix_mse"]
InputObserver = Literal["minmax", "percentile", "mse"]


class WeightArgs(BaseModel):
    """How weights are quantized: symmetric integers, one scale per output channel or per group of inputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    num_bits: Literal[4, 8] = 8
    """Bits of a weight."""
    type: Literal["int"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["channel", "group"] = "channel"
    """One scale per output channel, or per `group_size` inputs of each."""
    group_size: int | None = Field(default=None, ge=8)
    """Inputs that share a scale, with strategy: group."""
    observer: WeightObserver = "minmax"
    """minmax: the largest weight fits; percentile: 99.9 % do; mse: the scale with the least squared error; imatrix_mse:
    the same, each column weighted by the mean square of its input."""

    @model_validator(mode="after")
    def _check_group(self) -> WeightArgs:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("strategy: group and group_size go together")
        return self


class InputArgs(BaseModel):
    """How a Linear's input is quantized: int8, dynamic (symmetric per token) or static (asymmetric per tensor)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    num_bits: Literal[8] = 8
    type: Literal["int"] = "int"
    dynamic: bool = True
    """True: a scale per token, computed when it runs; False: one scale for all, from calibration."""
    symmetric: bool | None = None
    strategy: Literal["token", "tensor"] | None = None
    observer: InputObserver = "minmax"
    """Of static inputs. minmax: all fit; percentile: all but 0.001 %; mse: the range with the least squared error."""

    @model_validator(mode="after")
    def _check_form(self) -> InputArgs:
        symmetric, strategy = (True, "token") if self.dynamic else (False, "tensor")
        if self.symmetric not in (None, symmetric) or self.strategy not in (None, strategy):
            raise ValueError(
                "input activations are either dynamic, symmetric, strategy: token or static (dynamic: false),"
                " asymmetric (symmetric: false), strategy: tensor"
            )
        if self.dynamic and self.observer != "minmax":
            raise ValueError(
                f"observer: {self.observer} calibrates static inputs; dynamic ones have none"
            )
        return self


class ConfigGroup(BaseModel):
    """A scheme for some targets."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    targets: list[str]
    """Which Linears, in the forms of a modifier's targets."""
    weights: WeightArgs
    input_activations: InputArgs | None = None
    """Not given: activations stay in floating point."""

    @property
    def name(self) -> str:
        """W8A8 and so on."""
        return f"W{self.weights.num_bits}A{8 if self.input_activations else 16}"

    def group_size_for(self, name: str, columns: int) -> int:
        """The group size of a Linear with `columns` inputs, 0 for per channel; ModelError if it does not divide."""
        size = self.weights.group_size or 0
        if size and columns % size:
            fits = [str(s) for s in (128, 64, 32) if columns % s == 0]
            advice = f"group_size: {fits[0]} fits" if fits else "ignore this layer"
            raise ModelError(
                f"{name} has {columns} inputs, no multiple of group_size {size}; {advice}"
            )
        return size


def preset(
    scheme: Preset,
    targets: list[str],
    *,
    dynamic: bool = True,
    group_size: int | None = None,
    observer: WeightObserver = "minmax",
    input_observer: InputObserver = "minmax",
) -> ConfigGroup:
    """The scheme of a preset name; 4-bit weights are in groups of 128 unless `group_size` says otherwise."""
    bits, grouped = (4, True) if scheme.startswith("W4") else (8, group_size is not None)
    weights = WeightArgs(
        num_bits=4 if bits == 4 else 8,
        strategy="group" if grouped else "channel",
        group_size=(group_size or 128) if grouped else None,
        observer=observer,
    )
    inputs = None
    if scheme.endswith("A8"):
        inputs = InputArgs(dynamic=dynamic, observer=input_observer)
    return ConfigGroup(targets=targets, weights=weights, input_activations=inputs)
