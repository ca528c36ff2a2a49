"""SquareHead: distillation on the layers' hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from .layers import _LayerDistilling

if TYPE_CHECKING:
    from ..session import Session


class SquareHead(_LayerDistilling):
    """SquareHead (Kurtic et al. 2023, arXiv 2310.06927, equation 1): the layers' squared errors, each normalised.

    sum over layers of mean((Hs - Ht)^2) / (mean(Ht^2) + eps), over tokens with attention_mask 1; the embedding output
    is left out.
    """

    asks_for: ClassVar[str | None] = "output_hidden_states"

    tokens: Literal["all", "answer"] = "all"
    """Which tokens count: `all` but padding, or only those the task's loss is on."""
    eps: float = Field(default=2.0**-7, gt=0)
    """Guards the division; the default is bfloat16's step at 1."""

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        pairs = self.layer_pairs(session, batch, outputs)
        mask = batch.get("attention_mask")
        if self.tokens == "answer":
            mask = batch["labels"] != -100
        square = square_head(pairs, mask, self.eps)
        self.log_loss(session, "squarehead", square)
        return loss + self.weight * square


def square_head(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], mask: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The loss; (student, teacher) hidden states [batch, length, width], mask [batch, length] or None for all."""
    total = pairs[0][0].new_zeros((), dtype=torch.float32)
    for s, t in pairs:
        s, t = s.float(), t.float()
        if mask is not None:
            s, t = s[mask.bool()], t[mask.bool()]
        total = total + (s - t).square().mean() / (t.square().mean() + eps)
    return total
