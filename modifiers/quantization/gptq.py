"""GPTQ: round column by column, correcting the columns to come for each error made; then improve it in sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from ..hessian import inverse_factor
from .by_scheme import _SchemeQuantization, linear_of, observe_static_inputs
from .layer import dequantize_weight
from .observers import set_integers, weight_scale
from .rounded_inputs import RoundedInputs
from .rounding import eliminate, refit_scales, sweep
from .schemes import ConfigGroup

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


class GPTQ(_SchemeQuantization):
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), for weights and inputs in any of the schemes.

    The Linears of a block are quantized one after the other, in the order in which they compute: each sees what those
    before it now give. Where the scheme rounds inputs, the column loop works on rounded inputs, and aims at what the
    float weight makes of the unrounded ones. `sweeps` of coordinate descent (Behdin et al. 2023, QuantEase,
    arXiv 2309.01885) follow, each after a least-squares refit of the scales. A pruned weight stays exactly 0.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    block_size: int = Field(default=128, ge=1)
    """Columns after which the corrections of all columns to come are brought up to date."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    actorder: Literal["weight", "static"] | None = "weight"
    """weight, or its other name static: columns with the largest inputs are rounded first; groups stay where they are.
    None: from left to right."""
    sweeps: int = Field(default=3, ge=0)
    """Passes over all columns after the loop; 0 is GPTQ alone."""

    def quantize(self, session: Session, block: Block, schemes: Mapping[str, ConfigGroup]) -> None:
        linears = {name: linear_of(session, name) for name in schemes}
        errors = session.section(self).setdefault("errors", {})
        for names in _alike(block.shared_inputs(linears), schemes):
            first = schemes[names[0]]
            static = observe_static_inputs(block, {names[0]: first}).get(names[0])
            inputs = RoundedInputs(first.input_activations, static)
            block.run({names[0]: inputs.add})
            problem = self._problem(inputs)
            for name in names:
                weight = linears[name].weight.detach().float()
                held = session.masks.get(f"{name}.weight")
                kept = weight != 0 if held is None else held.to(weight.device)
                q, scale = self._solve(problem, name, weight, kept, schemes[name])
                errors[name] = inputs.gram.relative_error(weight, dequantize_weight(q, scale))
                layer = set_integers(linears[name], schemes[name], q, scale, static)
                self.keep(session, name, layer)
        if schemes:
            lost = sum(errors[name] for name in schemes) / len(schemes)
            session.block_note = f"error {lost:.3g}"

    def _problem(self, inputs: RoundedInputs) -> _Problem:
        gram = inputs.gram.matrix
        order = gram.diagonal().argsort(descending=True, stable=True) if self.actorder else None
        ordered = gram if order is None else gram[order][:, order]
        factor = inverse_factor(ordered, self.dampening_frac)
        damped = gram.clone()
        damped.diagonal().add_(factor.dampening * float(gram.diagonal().mean()))
        return _Problem(inputs, damped, factor.upper, order)

    def _solve(
        self,
        problem: _Problem,
        name: str,
        weight: torch.Tensor,
        kept: torch.Tensor,
        scheme: ConfigGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers [out, in] and scales [out, groups] for one Linear."""
        gram, bits = problem.damped, scheme.weights.num_bits
        target = problem.inputs.target(weight, gram)
        size = scheme.group_size_for(name, weight.shape[1])
        importance = problem.inputs.gram.matrix.diagonal()
        scale = weight_scale(target * kept, size, scheme.weights, importance)
        q = eliminate(target, kept, scale, problem.upper, bits, self.block_size, problem.order)
        for _ in range(self.sweeps):
            scale = refit_scales(q, target, scale, gram)
            q = sweep(q, target, kept, scale, gram, bits)
        return q, scale


@dataclass(frozen=True)
class _Problem:
    """What Linears that read the same input share."""

    inputs: RoundedInputs
    damped: torch.Tensor  # f32 [in, in]: the Gram matrix of the rounded inputs, dampened
    upper: torch.Tensor  # chol(damped^-1), of the columns in `order`
    order: torch.Tensor | None


def _alike(groups: list[list[str]], schemes: Mapping[str, ConfigGroup]) -> list[list[str]]:
    """The groups, split where schemes round inputs differently."""
    split: list[list[str]] = []
    for names in groups:
        found: dict[str, list[str]] = {}
        for name in names:
            inputs = schemes[name].input_activations
            found.setdefault(inputs.model_dump_json() if inputs else "", []).append(name)
        split += found.values()
    return split
