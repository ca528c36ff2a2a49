"""Quantization to integers by rounding, in any of the schemes, with the worst layers left in floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from ...errors import ModelError
from ..base import Modifier
from ..blocks import Stream
from .aware import AwareLinear
from .layer import attach
from .observers import MinMax, round_linear, weight_scale
from .schemes import ConfigGroup, Preset, WeightObserver, preset
from .skip import Skip

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class Quantization(Modifier):
    """Round weights, and where the scheme says so inputs, to integers (Jacob et al. 2017, arXiv 1712.05877).

    W8A8, W4A8: int8 inputs; W8A16, W4A16: inputs stay in floating point. Weights are symmetric per output channel
    (4-bit: per group of inputs); a pruned weight stays exactly 0. `skip` ranks all layers before any is quantized and
    after all modifiers that stand before this one, and writes ranking and choice into the report.

    In a training stage it is quantization-aware training (Jacob et al. 2017, section 3): from `start` on the Linears
    compute with rounded weights and inputs while training goes on in floating point, gradients passing straight
    through. Scales follow the weights at each update, static inputs the largest range seen, until `freeze_observer`.
    At `end` the weights are put on their grid, exactly, and are trained no more.
    """

    timing: ClassVar[frozenset[str]] = Modifier.timing | {"freeze_observer"}
    transient: ClassVar[frozenset[str]] = frozenset({"_aware"})

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

    freeze_observer: float | None = Field(default=None, ge=0)
    """In training: when scales stop following weights and inputs; not given: at `end`."""

    _aware: dict[str, AwareLinear] = PrivateAttr(default_factory=dict)
    _scores: dict[str, float] = PrivateAttr(default_factory=dict)
    _skipped: list[str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_scheme(self) -> Quantization:
        alone = self.scheme is None and self.config_groups
        if alone and (not self.dynamic or self.group_size or self.observer != "minmax"):
            raise ValueError(
                "dynamic, group_size and observer belong to scheme; config_groups have their own"
            )
        return self

    @model_validator(mode="after")
    def _check_freeze(self) -> Quantization:
        freeze = self.freeze_observer
        if freeze is not None and not self.start < freeze <= (self.end or freeze):
            raise ValueError(f"freeze_observer ({freeze:g}) must lie between start and end")
        return self

    def on_initialize(self, session: Session) -> None:
        if session.run == "oneshot":
            return
        if self.skip is not None:
            raise ModelError(
                f"{session.label(self)}: skip measures layers in a one-shot stage; in training name them in `ignore`"
            )
        if not session.will_start(self):
            raise ModelError(
                f"{session.label(self)} starts at {self.unit} {self.start:g}, which the stage does not reach; start it"
                " earlier or train longer"
            )
        self._aware.clear()
        blocks = Stream(session.model, None)
        for index in range(len(blocks.blocks)):
            for name, scheme in self._schemes(session, blocks.block(index)).items():
                linear = session.model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                self._aware[name] = AwareLinear(name, linear, scheme)
        if not self._aware:
            raise ModelError(f"{session.label(self)}: its targets mean no Linear in the blocks")

    def on_start(self, session: Session) -> None:
        for aware in self._aware.values():
            aware.observe_weight()
            aware.attach()

    def on_update(self, session: Session) -> None:
        frozen = self.freeze_observer is not None and session.reached(self, self.freeze_observer)
        for aware in self._aware.values():
            aware.observing = not frozen
            if not frozen:
                aware.observe_weight()

    def on_end(self, session: Session) -> None:
        frozen = self.freeze_observer is not None and session.reached(self, self.freeze_observer)
        counts: dict[str, int] = {}
        for name, aware in self._aware.items():
            if not frozen:
                aware.observe_weight()
            aware.detach()
            session.quantization[name] = layer = aware.integers()
            attach(layer)
            counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
        session.section(self)["layers"] = counts
        self._aware.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "aware": {name: aware.state_dict() for name, aware in self._aware.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "aware"})
        self._aware = {name: self._aware[name] for name in state["aware"]}  # none after the end
        for name, saved in state["aware"].items():
            self._aware[name].load_state_dict(saved)

    @property
    def needs_pass(self) -> bool:
        return self.skip is not None

    def on_observe(self, session: Session, block: Block) -> None:
        assert self.skip is not None  # only then there is a pass
        self._scores |= self.skip.measure(block, self._schemes(session, block))

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
            size = scheme.group_size_for(name, linear.weight.shape[1])
            scale = weight_scale(linear.weight.detach().float(), size, scheme.weights)
            session.quantization[name] = round_linear(linear, scheme, scale, static.get(name))
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
        if self._skipped is None:
            section = session.section(self)
            self._skipped = self.skip.choose(self._scores, section) if self.skip else []
        return self._skipped
