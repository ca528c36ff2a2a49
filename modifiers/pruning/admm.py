"""ADMM pruning: weights and mask found together, each pulling the other, then the best weights for the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PrivateAttr
from torch import nn

from ...errors import DataError, ModelError
from ..hessian import Gram
from ..mask_structure import MaskStructure
from ..precision import fast_float32
from .allocation.profile import places
from .calibrated import AUTO, _CalibratedPruning
from .layer import Layer
from .least_squares import conjugate_gradients
from .output_weights import output_shares, output_weights

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session

PERIOD = 3  # iterations between two looks at the mask
TOLERANCE = 1e-6


class ADMMPruning(_CalibratedPruning):
    """Masks and weights by ADMM: gradual mask, adaptive penalty, and conjugate gradients on the mask found.

    Minimises ||(W' - W) X||^2 over weights of the structure. The mask tightens by a cubic ramp (Boza 2024, TMLR, arXiv
    2401.02938, algorithm 2); then the penalty rho grows every 3 iterations, the slower the less of the mask still
    changes, until it is stable; conjugate gradients give the optimum on it (ALPS, Meng et al. 2024, arXiv 2406.07831,
    algorithms 1 and 2).

    Both papers scale the inputs to unit norm, which makes the magnitude of a weight Wanda's score. Here each input is
    scaled by 1 / sqrt((H^-1)_jj) instead, which makes it the score of the optimal brain surgeon: what removing the
    weight costs when all others make up for it. On SmolLM2-135M that lowers the layers' errors by 1 to 7 %.

    Before the first block, a backward pass over a few calibration samples tells how much the loss minds an error at
    each output of each Linear (`output_importance`); a mask that spans outputs removes more where it matters less.
    """

    iterations: int = Field(default=150, ge=1)
    """ADMM iterations at most; they end when the mask is stable, after 25 to 50 as a rule."""
    ramp_iterations: int = Field(default=8, ge=1)
    """Iterations over which the mask tightens to the target; 1: at once."""
    dampening_frac: float = Field(default=0.02, gt=0)
    """Added to the diagonal of the Gram matrix of unit-norm inputs; it holds weights near what they were."""
    rho: float = Field(default=0.1, gt=0)
    """The penalty that pulls weights to the mask, at first; a fraction of the scaled Gram matrix's mean diagonal."""
    conjugate_gradient_steps: int = Field(default=10, ge=0)
    """Steps of the finish at most."""
    output_importance: bool = True
    """Weigh the errors of a Linear's outputs by how much the loss minds them, from `importance_samples` samples."""

    _shares: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)
        self._shares = {}

    def on_block(self, session: Session, block: Block) -> None:
        if self._weighs_outputs() and not self._shares:
            if session.calibration is None:
                raise DataError(f"{block.reader} needs calibration data; give the stage `data:`")
            names = places(session, self.targets, self.ignore)
            found = session.modules(list(names))
            linears = {name: module for name, module in found if isinstance(module, nn.Linear)}
            tokens = session.calibration[: self.importance_samples]
            self._shares = output_shares(session.model, linears, tokens, session.seed)
        super().on_block(session, block)

    @property
    def weighs_outputs(self) -> bool:
        return self.output_importance

    def _weighs_outputs(self) -> bool:
        """N:M compares only weights of one output."""
        fixed = self.mask_structure != AUTO and MaskStructure.parse(self.mask_structure).sparsity
        return self.output_importance and not fixed

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with fast_float32():
            inputs = _Inputs.of(gram, self.dampening_frac)
            results = [self._solve(layer, inputs, gram) for layer in layers]
        notes["iterations"] = max(iterations for _, _, iterations in results)
        return [(weight, mask) for weight, mask, _ in results]

    def _solve(
        self, layer: Layer, inputs: _Inputs, gram: Gram
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The new weight, its mask, and the iterations it took. w, z and u are [out, in], scaled on both sides."""
        scale = inputs.scale.expand_as(layer.weight)
        if layer.name in self._shares:
            share = self._shares[layer.name]
            scale = scale * output_weights(share, layer.weight, gram).unsqueeze(1)
        w = layer.weight * scale
        alive = layer.kept & ~inputs.dead
        gone = ~alive
        target = w @ inputs.gram
        rho = self.rho * float(inputs.gram.diagonal().mean())
        inverse = inputs.inverse(rho)
        z, u, work = torch.empty_like(w), torch.zeros_like(w), torch.empty_like(w)  # all the memory
        mask = settled = alive
        iteration = 0
        for iteration in range(1, self.iterations + 1):
            u += w
            torch.square(u, out=work).masked_fill_(gone, -1.0)
            mask = layer.structure.mask(work, self._ramp(iteration, layer.sparsity)) & alive
            torch.mul(u, mask, out=z)
            u -= z
            since = iteration - self._ramp_length
            if since == 0:
                settled = mask
            elif since > 0 and since % PERIOD == 0:
                growth = _growth(mask, settled)
                if growth is None:
                    break
                settled = mask
                rho *= growth
                u /= growth  # u is the dual over rho
                inverse = inputs.inverse(rho)
            torch.sub(z, u, out=work)
            torch.mm(work.mul_(rho).add_(target), inverse, out=w)
        weight, _ = conjugate_gradients(
            z,
            target,
            inputs.gram,
            mask,
            steps=self.conjugate_gradient_steps,
            tolerance=TOLERANCE,
        )
        return weight / scale, mask, iteration

    @property
    def _ramp_length(self) -> int:
        return min(self.ramp_iterations, self.iterations)

    def _ramp(self, iteration: int, sparsity: float) -> float:
        left = max(0.0, 1 - iteration / self._ramp_length)
        return sparsity * (1 - left**3)


def _growth(mask: torch.Tensor, before: torch.Tensor) -> float | None:
    """By how much rho grows, from the share of kept weights that changed places; None: nothing changed."""
    changed = int((mask != before).sum()) / max(1, int(mask.sum()))
    if changed == 0:
        return None
    return 1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1


@dataclass(frozen=True)
class _Inputs:
    """The scaled Gram matrix of a Linear's inputs with its eigenvectors, so that each rho costs one product."""

    scale: torch.Tensor
    """f32 [in]: a weight times this is the weight of the scaled input."""
    dead: torch.Tensor
    """bool [in]: inputs that were always zero."""
    gram: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gram: Gram, dampening_frac: float) -> _Inputs:
        """Raises ModelError when the inputs hold NaN or infinity."""
        norms = gram.matrix.diagonal().sqrt()
        if not bool(norms.isfinite().all()):
            raise ModelError(
                "calibration inputs hold NaN or infinity; check the model and its data type"
            )
        dead = norms == 0
        norms = torch.where(dead, 1.0, norms)
        a = gram.matrix / torch.outer(norms, norms)
        a.diagonal().add_(dampening_frac)
        lower, failed = torch.linalg.cholesky_ex(a)
        if int(failed):
            raise ModelError(
                f"the Gram matrix of {len(a)} inputs has no Cholesky factor with dampening_frac {dampening_frac:g};"
                " raise it"
            )
        scale = torch.cholesky_inverse(lower).diagonal().rsqrt()
        a /= torch.outer(scale, scale)
        values, vectors = torch.linalg.eigh(a)
        return cls(norms * scale, dead, a, values, vectors)

    def inverse(self, rho: float) -> torch.Tensor:
        """(gram + rho I)^-1, f32 [in, in]; symmetric, so that rows stay rows: W A instead of A W."""
        return (self.vectors / (self.values + rho)) @ self.vectors.T
