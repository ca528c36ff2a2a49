"""`mask_structure: auto`: a pattern and a sparsity for every layer, under a budget of bytes or of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ....engine.cost import DType, cost, scale_bytes
from ...mask_structure import MaskStructure
from .budget import Option, choose
from .profile import Place, Share
from .survey import Survey
from .trial import curve

TRIED = (0.3, 0.45, 0.6, 0.75, 0.9)
FINE = torch.linspace(0.3, 0.9, 61, dtype=torch.float64).tolist()


class Budget(BaseModel):
    """What the pruned layers may cost the engine together: give one of bytes_per_weight and speed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    bytes_per_weight: float | None = Field(default=None, gt=0)
    """Bytes that decoding reads, for each weight of the matrices, kept or not; scales included."""
    speed: float | None = Field(default=None, gt=0)
    """How many times as fast as dense int8 the matrices are to be read, by the engine's cost model."""
    weight_bits: Literal[4, 8, 32] = 8
    """What the weights will be stored in (by a `Quantization` after this; 32: float)."""
    group_size: int = Field(default=0, ge=0)
    """Weights that will share a scale; 0: a row."""
    kernels: Literal["avx2", "avx512", "avx512_vnni", "avx512_vbmi2"] = "avx512_vbmi2"
    """The kernels that it is to be fast with. Not read from this machine, so that a recipe means the same on all."""

    @model_validator(mode="after")
    def _check_one(self) -> Budget:
        if (self.bytes_per_weight is None) == (self.speed is None):
            raise ValueError("give one of bytes_per_weight and speed, such as {speed: 2.0}")
        return self

    @property
    def dtype(self) -> DType:
        return {4: "i4", 8: "i8", 32: "f32"}[self.weight_bits]  # type: ignore[return-value]

    def price(
        self, weights: float, blocks: float, columns: int, pattern: str = "unstructured"
    ) -> float:
        """Of one weight of a matrix that keeps these fractions of weights and of 1x4 blocks: bytes, or cycles."""
        found = cost(self.dtype, weights, blocks, self.kernels, pattern, self.group_size)
        scales = scale_bytes(columns, self.group_size) if self.weight_bits < 32 else 0.0
        return found.bytes + scales if self.speed is None else found.cycles

    def limit(self, places: dict[str, Place]) -> float:
        """What all layers may cost together, in bytes or cycles."""
        size = sum(place.size for place in places.values())
        if self.speed is None:
            assert self.bytes_per_weight is not None
            return self.bytes_per_weight * size
        return cost("i8", 1.0, 1.0, self.kernels).cycles * size / self.speed


class Auto(Survey):
    """Minimises the loss over layers under a `Budget`, choosing for each a pattern and sparsity, or to stay dense.

    Losses are those of `Sensitivity`, tried for every candidate; prices are the engine's own. What the engine has no
    special kernel for costs what a bitmask costs, so it is chosen only where it loses less, which is nowhere.
    """

    def __init__(
        self, budget: Budget, candidates: list[str], samples: int, weigh_outputs: bool
    ) -> None:
        self.budget = budget
        tries: dict[str, list[float]] = {}
        for text in candidates:
            fixed = MaskStructure.parse(text).sparsity
            tries[text] = list(TRIED) if fixed is None else [fixed]
        super().__init__(tries, samples, weigh_outputs)

    def allocate(
        self, places: dict[str, Place], found: dict[str, Any], structure: str, sparsity: float
    ) -> dict[str, Share]:
        options: dict[str, list[Option]] = {}
        shares: dict[str, list[Share]] = {}
        dense = 0.0
        for name, place in places.items():
            whole = self.budget.price(1.0, 1.0, place.columns) * place.size
            dense += whole
            options[name] = [Option(0.0, 0.0)]
            shares[name] = [Share("unstructured", 0.0)]
            for share, error, price in self._ways(place, found[name]):
                options[name].append(Option(max(whole - price * place.size, 0.0), error))
                shares[name].append(share)
        taken = choose(options, dense - self.budget.limit(places))
        return {name: shares[name][taken[name]] for name in places}

    def _ways(
        self, place: Place, found: dict[str, list[list[float]]]
    ) -> list[tuple[Share, float, float]]:
        """Every way to prune a layer, with its error and the price of a weight."""
        ways = []
        for text, outcomes in found.items():
            tried = self.tries[text]
            at = FINE if len(tried) > 1 else tried
            columns = torch.tensor(outcomes, dtype=torch.float64).T
            errors = curve(tried, columns[0].tolist(), at)
            for index, s in enumerate(at):
                weights, blocks = (_between(tried, columns[i].tolist(), s) for i in (1, 2))
                price = self.budget.price(weights, blocks, place.columns, text)
                ways.append((Share(text, s), errors[index], price))
        return ways


def _between(x: Sequence[float], y: list[float], at: float) -> float:
    """Linear interpolation, constant beyond the ends."""
    for i in range(len(x) - 1):
        if x[i] <= at <= x[i + 1]:
            return y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i])
    return y[0] if at < x[0] else y[-1]
