"""Quantization to integers by rounding, in any of the schemes, with the worst layers left in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field, PrivateAttr, model_validator

from ...errors import ModelError
from ..base import Modifier
from ..blocks import Stream
from .aware import AwareLinear
from .by_scheme import _SchemeQuantization, linear_of
from .histogram import static_observers
from .layer import attach
from .observers import Importance, round_linear, weight_scale
from .schemes import ConfigGroup

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class Quantization(_SchemeQuantization):
    """Round weights, and where the scheme says so inputs, to integers (Jacob et al. 2017, arXiv 1712.05877).

    W8A8, W4A8: int8 inputs; W8A16, W4A16: inputs stay in floating point. Weights are symmetric per output channel
    (4-bit: per group of inputs); a pruned weight stays exactly 0. `skip` ranks all layers before any is quantized and
    after all modifiers that stand before this one, and writes ranking and choice into the report.

    In a training stage it is quantization-aware training (Jacob et al. 2017, section 3): from `start` on the Linears
    compute with rounded weights and inputs while training goes on in floating point, gradients passing straight
    through. Scales follow the weights at each update, static inputs the largest range seen, until `freeze_observer`.
    At `end` the weights are put on their grid, exactly, and are trained no more.
    """

    trains_weights: ClassVar[bool] = True
    timing: ClassVar[frozenset[str]] = Modifier.timing | {"freeze_observer"}
    transient: ClassVar[frozenset[str]] = frozenset({"_aware"})

    freeze_observer: float | None = Field(default=None, ge=0)
    """In training: when scales stop following weights and inputs; not given: at `end`."""

    _aware: dict[str, AwareLinear] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_freeze(self) -> Quantization:
        freeze = self.freeze_observer
        if freeze is not None and not self.start < freeze <= (self.end or freeze):
            raise ValueError(f"freeze_observer ({freeze:g}) must lie between start and end")
        return self

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)
        if session.run == "oneshot":
            return
        if self.kv_cache is not None:
            raise ModelError(
                f"{session.label(self)}: kv_cache is calibrated in a one-shot stage; put it into one after training"
            )
        if self.skip is not None:
            raise ModelError(
                f"{session.label(self)}: skip measures layers in a one-shot stage; in training name them in `ignore`"
            )
        self._aware.clear()
        blocks = Stream(session.model, None)
        for index in range(len(blocks.blocks)):
            for name, scheme in self._schemes(session, blocks.block(index)).items():
                _check_trainable(session.label(self), scheme)
                self._aware[name] = AwareLinear(name, linear_of(session, name), scheme)
        if not self._aware:
            raise ModelError(f"{session.label(self)}: its targets mean no Linear in the blocks")

    def on_start(self, session: Session) -> None:
        for aware in self._aware.values():
            aware.observe_weight()
            aware.attach()

    def on_update(self, session: Session) -> None:
        if not self._frozen(session):
            for aware in self._aware.values():
                aware.observe_weight()

    def on_gradients(self, session: Session) -> None:
        """Several processes have each seen their own inputs: from here on they have the range of all."""
        ranges = [aware.inputs for aware in self._aware.values()]
        if dist.is_available() and dist.is_initialized():
            highest = torch.tensor([(-seen.low, seen.high) for seen in ranges], dtype=torch.float64)
            highest = highest.to(session.device)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            for seen, (low, high) in zip(ranges, highest.tolist(), strict=True):
                seen.low, seen.high = -low, high

    def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        """The next forward is one step later."""
        for aware in self._aware.values():
            aware.observing = not self._frozen(session, ahead=1)

    def on_end(self, session: Session) -> None:
        frozen = self._frozen(session)
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

    def _frozen(self, session: Session, ahead: int = 0) -> bool:
        freeze = self.freeze_observer
        return freeze is not None and session.reached(self, freeze, ahead)

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

    def quantize(self, session: Session, block: Block, schemes: Mapping[str, ConfigGroup]) -> None:
        static = static_observers(schemes)
        block.run({name: observer.add for name, observer in static.items()})
        importance = {
            name: Importance()
            for name, scheme in schemes.items()
            if scheme.weights.observer == "imatrix_mse"
        }
        block.run({name: observer.add for name, observer in importance.items()})
        for name, scheme in schemes.items():
            linear = linear_of(session, name)
            size = scheme.group_size_for(name, linear.weight.shape[1])
            weight = linear.weight.detach().float()
            mean = importance[name].mean if name in importance else None
            scale = weight_scale(weight, size, scheme.weights, mean)
            self.keep(session, name, round_linear(linear, scheme, scale, static.get(name)))


def _check_trainable(label: str, scheme: ConfigGroup) -> None:
    inputs = scheme.input_activations
    if scheme.weights.observer == "imatrix_mse" or (inputs and inputs.observer != "minmax"):
        raise ModelError(
            f"{label}: these observers measure calibration data in a one-shot stage; in training scales follow"
            " weights by minmax, percentile or mse, and inputs by minmax"
        )
