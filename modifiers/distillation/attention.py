"""Attention transfer: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import nn

from ...errors import ModelError
from .layers import LayerMap, _LayerDistilling

if TYPE_CHECKING:
    from ..session import Session


class AttentionTransfer(_LayerDistilling):
    """Add KL(teacher || student) of the attention distributions (MiniLM, Wang et al. 2020, arXiv 2002.10957).

    The mean over heads and over tokens with attention_mask 1, summed over the mapped layers. Only plain ("eager")
    attention puts its distributions out, so both models compute with it while the window is open.
    """

    asks_for: ClassVar[str | None] = "output_attentions"

    layers: LayerMap = "last"
    """Who learns from whom: `last` (as the paper has it), `uniform`, or {student: teacher} block numbers from 0."""

    _usual: list[str] = PrivateAttr(default_factory=list)  # both models' own kinds

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)
        models = (session.model, self.load(session))
        self._usual = [_kind(session.label(self), model) for model in models]

    def on_end(self, session: Session) -> None:
        if any(session.is_active(m) for m in session.modifiers if isinstance(m, AttentionTransfer)):
            return  # another still looks
        for model, kind in zip((session.model, self.load(session)), self._usual, strict=True):
            _use(model, kind)

    def prepare(self, session: Session) -> None:
        for model in (session.model, self.load(session)):
            _use(model, "eager")

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        pairs = self.layer_pairs(session, batch, outputs)
        mask = batch.get("attention_mask")
        transfer = torch.stack([divergence(s, t, mask) for s, t in pairs]).sum()
        self.log_loss(session, "attention", transfer)
        return loss + self.weight * transfer


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """KL(teacher || student), mean over heads and queries; probabilities [batch, heads, query, key]."""
    tiny = torch.finfo(torch.float32).tiny  # what causality forbids is 0 in both and adds nothing
    t, s = teacher.float(), student.float()
    kl = (t * (t.clamp_min(tiny).log() - s.clamp_min(tiny).log())).sum(-1).mean(1)
    return kl[mask.bool()].mean() if mask is not None else kl.mean()


def _kind(label: str, model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind is None:
        raise ModelError(
            f"{label}: {type(model).__name__} does not let its kind of attention be chosen; use SquareHead instead"
        )
    return str(kind)


def _use(model: Any, kind: str) -> None:
    if model.config._attn_implementation != kind:
        model.set_attn_implementation(kind)
