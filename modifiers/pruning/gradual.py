"""What the gradual pruners share: the schedule of the sparsity, and masks from scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator

from ...errors import ModelError
from ..base import Modifier
from ..mask_structure import MaskStructure, MaskStructureName
from ..schedule import Milestones, Scheduler, ramp, stepped

if TYPE_CHECKING:
    from ..session import Session


class _GradualPruning(Modifier):
    """Remove the weights that score lowest, ever more of them; a subclass defines `scores`.

    In a training stage the sparsity goes from `init_sparsity` at `start` to `final_sparsity` at `end`, exactly, along
    the ramp of Zhu & Gupta 2017 (arXiv 1710.01878) or another; afterwards the mask is held.
    """

    timing: ClassVar[frozenset[str]] = Modifier.timing | {"milestones"}
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"init_sparsity", "update_scheduler", "power"}
    )

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The sparsity throughout; the same as giving `init_sparsity` and `final_sparsity` this value."""
    init_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The sparsity at `start`; 0 if not given."""
    final_sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The sparsity at `end`."""
    milestones: Milestones | None = None
    """Instead of final_sparsity, steps: {time: the sparsity from then on}, such as {1: 0.5, 2: 0.6}."""
    update_scheduler: Scheduler = "cubic"
    """How the sparsity goes from one to the other: cubic, linear, cosine or polynomial."""
    power: float = Field(default=3.0, gt=0)
    """The power of update_scheduler: polynomial; 1 is linear, 3 cubic."""
    global_sparsity: bool = False
    """True: one threshold over all targets together, so that layers differ; False: each layer alike."""
    mask_structure: MaskStructureName = "unstructured"
    """unstructured, N:M (N kept of every M inputs), 1x4, 4x1, 16x1 or 2x1."""

    @model_validator(mode="after")
    def _check_sparsities(self) -> _GradualPruning:
        given = [self.sparsity, self.final_sparsity, self.milestones]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "give either sparsity or final_sparsity (with init_sparsity, where it ramps), or milestones"
            )
        if self.sparsity is not None and self.init_sparsity is not None:
            raise ValueError("init_sparsity goes with final_sparsity, not with sparsity")
        first, last = self._ends()
        if self.milestones is not None:
            self._check_milestones([first, *self.milestones.values()])
        if first > last:
            raise ValueError(f"init_sparsity ({first:g}) is above final_sparsity ({last:g})")
        fixed = MaskStructure.parse(self.mask_structure).sparsity
        if fixed is not None and last != fixed:
            raise ValueError(
                f"mask_structure {self.mask_structure} is {fixed:g} sparse, not {last:g}"
            )
        if self.global_sparsity and self.mask_structure != "unstructured":
            raise ValueError("global_sparsity works only with mask_structure: unstructured")
        return self

    def _check_milestones(self, values: list[float]) -> None:
        if not all(0 <= value < 1 for value in values):
            raise ValueError("milestones has a sparsity that is not in [0, 1)")
        if values != sorted(values):
            raise ValueError(
                "milestones goes down; a zero once held stays zero, so it can only rise"
            )
        assert self.milestones is not None
        if self.end is not None and max(self.milestones) > self.end:
            raise ValueError("milestones has a time after end")

    _applied: float | None = PrivateAttr(default=None)

    def _ends(self) -> tuple[float, float]:
        if self.sparsity is not None:
            return self.sparsity, self.sparsity
        last = self.final_sparsity
        if self.milestones is not None:
            last = list(self.milestones.values())[-1]
        assert last is not None
        return self.init_sparsity or 0.0, last

    def scheduled_sparsity(self, session: Session) -> float:
        """The sparsity due at the session's step."""
        if self.milestones is not None and session.run == "train":
            first = self._ends()[0]
            return stepped(first, self.milestones, lambda time: session.reached(self, time))
        return ramp(self.update_scheduler, *self._ends(), session.progress(self), self.power)

    def scores(
        self, session: Session, weights: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        """A score f32 for each weight [out, in], the lowest to be removed first; None: nothing is known yet."""
        raise NotImplementedError

    def remove(self, name: str, weight: torch.Tensor, mask: torch.Tensor) -> None:
        """Zero in place the weights [out, in] that `mask` does not keep; may also change those kept."""
        weight.masked_fill_(~mask, 0)

    def on_initialize(self, session: Session) -> None:
        self._applied = None  # by an earlier run of the same recipe

    def on_update(self, session: Session) -> None:
        self._prune(session, self.scheduled_sparsity(session))

    def on_end(self, session: Session) -> None:
        last = self._ends()[1]
        self._prune(session, last)
        if self._applied != last:
            raise ModelError(
                f"{session.label(self)} reached its end without a gradient of every target; are they frozen or unused?"
                " Put those in `ignore`"
            )

    def _prune(self, session: Session, sparsity: float) -> None:
        if sparsity == self._applied:  # the masks are held: choosing again would give the same ones
            return
        structure = MaskStructure.parse(self.mask_structure)
        weights = dict(session.weights(self.targets, self.ignore))
        for name, weight in weights.items():
            structure.check(name, tuple(weight.shape))
        found = self.scores(session, weights)
        if found is None:
            return
        self._applied = sparsity
        # MaskStructure ranks scores >= 0, and those below before all others: what is held already.
        lowest = min(0.0, *(float(score.min()) for score in found.values()))
        scores = {}
        for name, score in found.items():
            score = score - lowest if lowest < 0 else score
            held = session.masks.get(name)
            scores[name] = (
                score if held is None else score.masked_fill(~held.to(score.device), -1.0)
            )
        if self.global_sparsity:
            flat = torch.cat([score.flatten() for score in scores.values()])
            split = structure.mask(flat.unsqueeze(0), sparsity).flatten()
            parts = split.split([score.numel() for score in scores.values()])
            masks = {n: p.reshape(scores[n].shape) for n, p in zip(scores, parts, strict=True)}
        else:
            masks = {name: structure.mask(score, sparsity) for name, score in scores.items()}
        for name, mask in masks.items():
            held = session.masks.get(name)
            mask = mask if held is None else mask & held.to(mask.device)
            session.masks.hold(name, mask)
            if name.removesuffix(".weight") in session.quantization:
                # Those kept stay on their grid.
                _GradualPruning.remove(self, name, weights[name], mask)
            else:
                self.remove(name, weights[name], mask)
        removed = sum(int((~mask).sum()) for mask in masks.values())
        session.log(
            f"{session.label(self)}/sparsity",
            removed / sum(mask.numel() for mask in masks.values()),
        )
        if session.run == "oneshot":
            session.section(self)["sparsity"] = {n: session.masks.sparsity(n) for n in masks}
