"""Quantization to integers by rounding, in any of the schemes, with the worst layers left in floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from torch import nn

from ...errors import ModelError
from ..base import Modifier
from .layer import LayerQuantization, attach, dequantize_weight, quantize_weight
from .observers import MinMax, weight_scale
from .schemes import ConfigGroup, Preset, WeightObserver, preset

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class Skip(BaseModel):
    """Which layers stay in floating point."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    by: Literal["input_range"] = "input_range"
    """input_range: layers are ranked by max - min of their input over the calibration."""
    top: int = Field(ge=1)
    """How many of the first-ranked layers."""


class Quantization(Modifier):
    """Round weights, and where the scheme says so inputs, to integers (Jacob et al. 2017, arXiv 1712.05877).

    W8A8, W4A8: int8 inputs; W8A16, W4A16: inputs stay in floating point. Weights are symmetric per output channel
    (4-bit: per group of inputs); a pruned weight stays exactly 0. `skip` ranks all layers before any is quantized and
    after all modifiers that stand before this one, and writes ranking and choice into the report.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    scheme: Preset | None = None
    """The scheme of all targets; W8A8 unless config_groups are given."""
    config_groups: dict[str, ConfigGroup] | None = None
    """Named schemes for their own targets; the first that means a layer decides, before `scheme`."""
    dynamic: bool = True
    """Of `scheme`'s int8 inputs: a scale per token (true), or one from calibration (false)."""
    group_size: int | None = Field(default=None, ge=8)
    """Of `scheme`'s weights: inputs that share a scale; 4-bit: 128 if not given."""
    observer: WeightObserver = "minmax"
    """Of `scheme`'s weights: minmax or mse."""
    skip: Skip | None = None
    """Layers to leave in floating point, chosen by measuring."""

    _ranges: dict[str, list[float]] = PrivateAttr(default_factory=dict)
    _skipped: list[str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_scheme(self) -> Quantization:
        alone = self.scheme is None and self.config_groups
        if alone and (not self.dynamic or self.group_size or self.observer != "minmax"):
            raise ValueError(
                "dynamic, group_size and observer belong to scheme; config_groups have their own"
            )
        return self

    @property
    def needs_pass(self) -> bool:
        return self.skip is not None

    def on_observe(self, session: Session, block: Block) -> None:
        ranges = {name: MinMax() for name in self._schemes(session, block)}
        block.run({name: observer.add for name, observer in ranges.items()})
        self._ranges |= {name: [observer.low, observer.high] for name, observer in ranges.items()}

    def on_block(self, session: Session, block: Block) -> None:
        skipped = self._choose_skipped(session)
        schemes = {n: s for n, s in self._schemes(session, block).items() if n not in skipped}
        static = {
            name: MinMax()
            for name, scheme in schemes.items()
            if scheme.input_activations and not scheme.input_activations.dynamic
        }
        if static:
            block.run({name: observer.add for name, observer in static.items()})
        for name, scheme in schemes.items():
            linear = session.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            session.quantization[name] = _quantize(name, linear, scheme, static.get(name))
            attach(session.quantization[name])
        counts = session.section(self).setdefault("layers", {})
        for scheme in schemes.values():
            counts[scheme.name] = counts.get(scheme.name, 0) + 1

    def _schemes(self, session: Session, block: Block) -> dict[str, ConfigGroup]:
        """The scheme of each Linear of the block that is to be quantized."""
        groups = list((self.config_groups or {}).values())
        if self.scheme is not None or not groups:
            groups.append(
                preset(
                    self.scheme or "W8A8",
                    self.targets,
                    dynamic=self.dynamic,
                    group_size=self.group_size,
                    observer=self.observer,
                )
            )
        found: dict[str, ConfigGroup] = {}
        for group in groups:
            for name in block.linears(group.targets, self.ignore):
                found.setdefault(name, group)
        for name in found:
            if name in session.quantization:
                raise ModelError(f"{name} is quantized already; put it in `ignore`")
        order = [f"{block.name}.{name}" for name, _ in block.module.named_modules()]
        return {name: found[name] for name in order if name in found}

    def _choose_skipped(self, session: Session) -> list[str]:
        if self._skipped is not None:
            return self._skipped
        if self.skip is None:
            self._skipped = []
            return self._skipped
        ranking = sorted(
            self._ranges, key=lambda name: self._ranges[name][0] - self._ranges[name][1]
        )
        if self.skip.top >= len(ranking):
            raise ModelError(
                f"skip: top: {self.skip.top} would leave all {len(ranking)} layers in floating point"
            )
        self._skipped = ranking[: self.skip.top]
        session.section(self)["skipped"] = self._skipped
        session.section(self)["input_range"] = {
            name: self._ranges[name][1] - self._ranges[name][0] for name in ranking
        }
        return self._skipped


def _quantize(
    name: str, linear: nn.Linear, scheme: ConfigGroup, inputs: MinMax | None
) -> LayerQuantization:
    """Put the weight on its grid and say how."""
    weight = linear.weight.detach().float()
    group_size = scheme.group_size_for(name, weight.shape[1])
    scale = weight_scale(weight, group_size, scheme.weights)
    q = quantize_weight(weight, scale, scheme.weights.num_bits)
    linear.weight.data.copy_(dequantize_weight(q, scale))
    activations = scheme.input_activations
    input_scale, zero_point = inputs.qparams() if inputs else (None, None)
    return LayerQuantization(
        module=linear,
        scheme=scheme.name,
        weight_bits=scheme.weights.num_bits,
        group_size=group_size,
        scale=scale,
        input_bits=activations.num_bits if activations else None,
        input_dynamic=activations.dynamic if activations else True,
        input_scale=input_scale,
        input_zero_point=zero_point,
    )
