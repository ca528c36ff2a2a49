"""Which layers stay in floating point: measured before any layer is quantized, chosen once all are measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...errors import ModelError
from .observers import MinMax

if TYPE_CHECKING:
    from ..blocks import Block
    from .schemes import ConfigGroup


class Skip(BaseModel):
    """Which layers stay in floating point.

    A quantizing modifier with a `skip` needs a pass: `measure` in its `on_observe`, at each block, with scores kept in
    a private attribute; then `choose`, once, before the first layer is quantized.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    by: Literal["input_range"] = "input_range"
    """input_range: layers are ranked by max - min of their input over the calibration."""
    top: int = Field(ge=1)
    """How many of the first-ranked layers."""

    def measure(self, block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
        """The score of each of the block's Linears that have a scheme: the higher, the sooner it is skipped."""
        ranges = {name: MinMax() for name in schemes}
        block.run({name: observer.add for name, observer in ranges.items()})
        return {name: observer.high - observer.low for name, observer in ranges.items()}

    def choose(self, scores: Mapping[str, float], section: dict[str, Any]) -> list[str]:
        """The layers to skip, worst first; ranking and choice go into the modifier's section of the report.

        ModelError when nothing would be left to quantize.
        """
        ranking = sorted(scores, key=lambda name: -scores[name])
        if self.top >= len(ranking):
            raise ModelError(
                f"skip: top: {self.top} would leave all {len(ranking)} layers in floating point"
            )
        section["skipped"] = ranking[: self.top]
        section[self.by] = {name: scores[name] for name in ranking}
        return ranking[: self.top]
