"""Magnitude pruning: remove the smallest weights, at once or step by step while training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator

from ..base import Modifier
from ..mask_structure import MaskStructure, MaskStructureName
from ..schedule import ramp

if TYPE_CHECKING:
    from ..session import Session


class MagnitudePruning(Modifier):
    """Remove the smallest weights, per layer or over all layers at once.

    In a training stage the sparsity goes from `init_sparsity` at `start` to `final_sparsity` at `end`, exactly, along
    the ramp of Zhu & Gupta 2017 (arXiv 1710.01878); afterwards the mask is held. One-shot: `final_sparsity` at once.
    """

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The sparsity throughout; the same as giving `init_sparsity` and `final_sparsity` this value."""
    init_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """The sparsity at `start`; 0 if not given."""
    final_sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The sparsity at `end`."""
    update_scheduler: Literal["cubic", "linear", "cosine"] = "cubic"
    """How the sparsity goes from one to the other."""
    global_sparsity: bool = False
    """True: one threshold over all targets together, so that layers differ; False: each layer alike."""
    mask_structure: MaskStructureName = "unstructured"
    """unstructured, N:M (N kept of every M inputs), 1x4, 4x1, 16x1 or 2x1."""

    @model_validator(mode="after")
    def _check_sparsities(self) -> MagnitudePruning:
        if (self.sparsity is None) == (self.final_sparsity is None):
            raise ValueError(
                "give either sparsity or final_sparsity (with init_sparsity, where it ramps)"
            )
        if self.sparsity is not None and self.init_sparsity is not None:
            raise ValueError("init_sparsity goes with final_sparsity, not with sparsity")
        first, last = self._ends()
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

    _applied: float | None = PrivateAttr(default=None)

    def _ends(self) -> tuple[float, float]:
        if self.sparsity is not None:
            return self.sparsity, self.sparsity
        assert self.final_sparsity is not None
        return self.init_sparsity or 0.0, self.final_sparsity

    def scheduled_sparsity(self, session: Session) -> float:
        """The sparsity due at the session's step."""
        return ramp(self.update_scheduler, *self._ends(), session.progress(self))

    def on_update(self, session: Session) -> None:
        self._prune(session, self.scheduled_sparsity(session))

    def on_end(self, session: Session) -> None:
        self._prune(session, self._ends()[1])

    def _prune(self, session: Session, sparsity: float) -> None:
        if sparsity == self._applied:  # the masks are held: choosing again would give the same ones
            return
        self._applied = sparsity
        structure = MaskStructure.parse(self.mask_structure)
        weights = dict(session.weights(self.targets, self.ignore))
        scores = {}
        for name, weight in weights.items():
            structure.check(name, tuple(weight.shape))
            held = session.masks.get(name)
            score = weight.abs().float()
            scores[name] = (
                score if held is None else score.masked_fill_(~held.to(score.device), -1.0)
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
            weights[name].masked_fill_(~mask, 0)
        removed = sum(int((~mask).sum()) for mask in masks.values())
        session.log(
            f"{session.label(self)}/sparsity",
            removed / sum(mask.numel() for mask in masks.values()),
        )
        if session.run == "oneshot":
            session.section(self)["sparsity"] = {n: session.masks.sparsity(n) for n in masks}
