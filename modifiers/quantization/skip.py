"""Which layers stay in floating point: measured before any layer is quantized, chosen once all are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from ...errors import ModelError

if TYPE_CHECKING:
    from ..blocks import Block
    from .schemes import ConfigGroup

Score = Literal["input_range", "output_error", "noise"]
UNITS = 20_000  # into which a budget is cut at most: finer cuts would gain too little


def _share(value: Any) -> Any:
    """`3%` as 0.03; anything else is left to pydantic."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        try:
            return float(value.rstrip().removesuffix("%")) / 100
        except ValueError:
            raise ValueError(
                f"a share is a number below 1 or a percentage as 3%, got {value!r}"
            ) from None
    return value


Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(gt=0, lt=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": r"^\s*[0-9.]+\s*%\s*$"},
            ]
        }
    ),
]
"""A part of a whole: a number between 0 and 1, or a percentage as text."""


class Skip(BaseModel):
    """Which layers stay in floating point: the `top` so many, or as many as a `budget` allows.

    A quantizing modifier with a `skip` needs a pass: `measure` in its `on_observe`, at each block, with scores kept in
    a private attribute; then `choose`, once, before the first layer is quantized.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    by: Score = "output_error"
    """What ranks them. output_error: the error of the block's output when that layer alone is quantized; noise: the
    error that the grids of its weights and inputs make one expect; input_range: max - min of its input."""
    top: int | None = Field(default=None, ge=1)
    """How many of the first-ranked layers."""
    budget: Share | None = None
    """The largest share of the targeted layers' weights to leave in floating point, as 0.03 or 3%."""

    @model_validator(mode="after")
    def _check_one(self) -> Skip:
        if (self.top is None) == (self.budget is None):
            raise ValueError("give either top (how many layers) or budget (which share of weights)")
        return self

    def measure(self, block: Block, schemes: Mapping[str, ConfigGroup]) -> dict[str, float]:
        """The score of each of the block's Linears that have a scheme: the higher, the sooner it is skipped."""
        from .sensitivity import scores  # needs the observers, which need what Skip is part of

        return scores(self.by, block, schemes)

    def choose(
        self, found: Mapping[str, float], sizes: Mapping[str, int], section: dict[str, Any]
    ) -> list[str]:
        """The layers to skip, worst first; ranking and choice go into the modifier's section of the report.

        found, sizes: score and number of weights of each layer. Under a budget, errors add up, so the layers with the
        largest sum are taken; ranges don't, so layers are taken in their order as long as they fit. ModelError when
        all layers would be skipped, or none.
        """
        ranking = sorted(found, key=lambda name: -found[name])
        total = sum(sizes[name] for name in ranking)
        if self.top is not None:
            chosen = ranking[: self.top]
        elif self.by == "input_range":
            chosen = first_that_fit(ranking, sizes, self._allowed(total))
        else:
            chosen = best_under_budget(found, sizes, self._allowed(total))
        if len(chosen) == len(ranking):
            raise ModelError(
                f"skip: top: {self.top} would leave all {len(ranking)} layers in floating point"
            )
        if not chosen:
            smallest = min(sizes[name] for name in ranking) / total
            raise ModelError(
                f"skip: budget: {self.budget:.3g} is less than the smallest layer, which holds {smallest:.3g} of the"
                " weights; raise it, or take skip out"
            )
        section["skipped"] = chosen
        section["skipped_share"] = sum(sizes[name] for name in chosen) / total
        section[self.by] = {name: found[name] for name in ranking}
        return chosen

    def _allowed(self, total: int) -> int:
        """The budget as a number of weights; what is a whole number but for the last bit of a float stays one."""
        assert self.budget is not None
        return math.floor(self.budget * total * (1 + 1e-12))


def first_that_fit(ranking: list[str], sizes: Mapping[str, int], allowed: int) -> list[str]:
    """In order of rank, each layer that still fits."""
    chosen: list[str] = []
    for name in ranking:
        if sizes[name] <= allowed:
            chosen.append(name)
            allowed -= sizes[name]
    return chosen


def best_under_budget(
    values: Mapping[str, float], sizes: Mapping[str, int], allowed: int
) -> list[str]:
    """The layers with the largest sum of values and at most `allowed` weights, largest value first.

    The 0-1 knapsack by dynamic programming over the budget, in units of the sizes' greatest common divisor; exact
    unless that makes more than UNITS of them (then sizes are rounded up, and the budget still holds).
    """
    unit = max(math.gcd(*sizes.values()), -(-allowed // UNITS), 1)
    capacity = allowed // unit
    best = np.zeros(capacity + 1)
    taken: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
    for name, value in values.items():
        size = -(-sizes[name] // unit)
        taken[name] = np.zeros(capacity + 1, dtype=bool)
        if size > capacity or value <= 0:
            continue
        with_it = best[: capacity + 1 - size] + value
        taken[name][size:] = with_it > best[size:]
        best[size:] = np.maximum(best[size:], with_it)
    chosen: list[str] = []
    room = capacity
    for name in reversed(list(values)):
        if taken[name][room]:
            chosen.append(name)
            room -= -(-sizes[name] // unit)
    return sorted(chosen, key=lambda name: -values[name])
