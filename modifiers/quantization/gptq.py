"""GPTQ: round column by column, correcting the columns to come for each error made; then improve it in sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from ..hessian import Gram
from .by_scheme import _SchemeQuantization, linear_of
from .gptq_problem import Problem, evenly
from .histogram import static_observers
from .layer import dequantize_weight
from .observers import set_integers
from .schemes import ConfigGroup, WeightObserver

if TYPE_CHECKING:
    from ..blocks import Block, Observer
    from ..session import Session


class GPTQ(_SchemeQuantization):
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), for weights in any of the schemes.

    `sweeps` of coordinate descent (Behdin et al. 2023, QuantEase, arXiv 2309.01885) follow, each after a least-squares
    refit of the scales. A pruned weight stays exactly 0: it gets no correction, and the others make up for it.
    Tokens longer than the median count as one of median length.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    observer: WeightObserver = "imatrix_mse"
    """Of `scheme`'s weights: minmax, percentile, mse, or imatrix_mse, which weights columns by their input."""
    block_size: int = Field(default=128, ge=1)
    """Columns after which the corrections of all columns to come are brought up to date."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    actorder: Literal["weight", "static"] | None = "weight"
    """weight, or its other name static: columns with the largest inputs are rounded first; groups stay where they are.
    None: from left to right."""
    sweeps: int = Field(default=2, ge=0)
    """Passes over all columns after the loop; 0 is GPTQ alone."""

    @field_validator("actorder", mode="before")
    @classmethod
    def _check_actorder(cls, value: object) -> object:
        if value in ("group", "dynamic"):
            raise ValueError(
                f"actorder: {value} scatters a group's columns over the row, which the engine does not run;"
                " weight rounds in the same order and keeps groups together"
            )
        return value

    def quantize(self, session: Session, block: Block, schemes: Mapping[str, ConfigGroup]) -> None:
        linears = {name: linear_of(session, name) for name in schemes}
        static = static_observers(schemes)
        grams = [(names, Gram()) for names in block.shared_inputs(linears)]
        block.run(
            {
                names[0]: _all_of([evenly(gram), *(static[n].add for n in names if n in static)])
                for names, gram in grams
            }
        )
        errors = session.section(self).setdefault("errors", {})
        for names, gram in grams:
            problem = self._problem(gram)
            for name in names:
                weight = linears[name].weight.detach().float()
                held = session.masks.get(f"{name}.weight")
                kept = weight != 0 if held is None else held.to(weight.device)
                size = schemes[name].group_size_for(name, weight.shape[1])
                weights = schemes[name].weights
                q, scale = problem.solve(
                    weight, kept, size, weights, block_size=self.block_size, sweeps=self.sweeps
                )
                errors[name] = gram.relative_error(weight, dequantize_weight(q, scale))
                layer = set_integers(linears[name], schemes[name], q, scale, static.get(name))
                self.keep(session, name, layer)
        if schemes:
            lost = sum(errors[name] for name in schemes) / len(schemes)
            session.block_note = f"error {lost:.3g}"

    def _problem(self, gram: Gram) -> Problem:
        return Problem.of(gram, self.dampening_frac, reorder=self.actorder is not None)


def _all_of(observers: list[Observer]) -> Observer:
    def observe(x: torch.Tensor) -> None:
        for observer in observers:
            observer(x)

    return observe
