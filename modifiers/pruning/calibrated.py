"""What the calibrated pruners share: at each block, observe the inputs of its Linears, prune, hold the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from ..base import Modifier
from ..hessian import Gram
from ..mask_structure import MaskStructure, MaskStructureName

if TYPE_CHECKING:
    from ..blocks import Block
    from ..session import Session


@dataclass(frozen=True)
class Layer:
    """One Linear to prune: weight f32 [out, in], not to be changed, and what is to become of it."""

    name: str
    weight: torch.Tensor
    kept: torch.Tensor
    """bool [out, in]: False where a weight is zero and must stay so."""
    structure: MaskStructure
    sparsity: float


class _CalibratedPruning(Modifier):
    """A pruner of Linears that looks at X^T X of their inputs; a subclass defines `prune`."""

    stages: ClassVar[frozenset[str]] = frozenset({"oneshot"})

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The fraction of weights to remove; N:M fixes it itself."""
    mask_structure: MaskStructureName = "unstructured"
    """unstructured, N:M (N kept of every M inputs), 1x4, 4x1, 16x1 or 2x1."""

    @model_validator(mode="after")
    def _check_sparsity(self) -> _CalibratedPruning:
        fixed = MaskStructure.parse(self.mask_structure).sparsity
        if fixed is None and self.sparsity is None:
            raise ValueError("sparsity is missing, such as sparsity: 0.5")
        if fixed is not None and self.sparsity not in (None, fixed):
            raise ValueError(
                f"mask_structure {self.mask_structure} is {fixed:g} sparse, but sparsity is {self.sparsity:g};"
                " leave sparsity out"
            )
        return self

    @property
    def structure(self) -> MaskStructure:
        return MaskStructure.parse(self.mask_structure)

    @property
    def target_sparsity(self) -> float:
        sparsity = self.structure.sparsity
        if sparsity is None:
            assert self.sparsity is not None
            sparsity = self.sparsity
        return sparsity

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prune Linears that share one input, of which `gram` is X^T X.

        Returns each new weight f32 [out, in] with its mask (True = kept). `notes` goes into the report.
        """
        raise NotImplementedError

    def on_block(self, session: Session, block: Block) -> None:
        linears = block.linears(self.targets, self.ignore)
        for name, linear in linears.items():
            self.structure.check(name, tuple(linear.weight.shape))
        groups = [(names, Gram()) for names in block.shared_inputs(linears)]
        block.run({names[0]: gram.add for names, gram in groups})
        found = session.section(self).setdefault("layers", {})
        lost = []
        for names, gram in groups:
            tasks = [self._task(session, name, linears[name]) for name in names]
            notes: dict[str, Any] = {}
            results = self.prune(gram, tasks, notes)
            for task, (after, mask) in zip(tasks, results, strict=True):
                name, before = task.name, task.weight
                mask = mask & task.kept
                after = after.masked_fill(~mask, 0)
                error = gram.relative_error(
                    before, after
                )  # first: `before` may be the weight itself
                linears[name].weight.data.copy_(after)
                session.masks.hold(f"{name}.weight", mask)
                sparsity = 1 - int(mask.sum()) / mask.numel()
                found[name] = {"sparsity": sparsity, "error": error, **notes}
                lost.append(error)
        if lost:
            session.block_note = f"error {sum(lost) / len(lost):.3g}"

    def _task(self, session: Session, name: str, linear: nn.Linear) -> Layer:
        weight = linear.weight.detach().float()
        held = session.masks.get(f"{name}.weight")
        # a held mask before the zeros themselves: a kept weight may be zero by chance
        return self.layer(name, weight, weight != 0 if held is None else held.to(weight.device))

    def layer(self, name: str, weight: torch.Tensor, kept: torch.Tensor) -> Layer:
        """What this modifier's settings ask of one Linear."""
        return Layer(name, weight, kept, self.structure, self.target_sparsity)
