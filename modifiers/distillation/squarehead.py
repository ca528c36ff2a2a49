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
    is left out. Models whose first token carries huge activations (Sun et al. 2024, arXiv 2402.17762) owe their mean
    to that token, and a layer divided by it no longer counts: give them `normalize: token`.
    """

    asks_for: ClassVar[str | None] = "output_hidden_states"

    tokens: Literal["all", "answer"] = "all"
    """Which tokens count: `all` but padding, or only those from which the task's loss has one predicted."""
    normalize: Literal["layer", "token"] = "layer"
    """layer: as in the equation, one mean(Ht^2) for all tokens; token: each token's error by its own."""
    eps: float = Field(default=2.0**-7, gt=0)
    """Guards the division; the default is bfloat16's step at 1."""

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        pairs = self.layer_pairs(session, batch, outputs)
        mask = batch.get("attention_mask")
        if self.tokens == "answer":  # a label is what the token before it should predict
            mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        square = square_head(pairs, mask, self.eps, self.normalize)
        self.log_loss(session, "squarehead", square)
        return loss + self.weight * square


def square_head(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None,
    eps: float,
    normalize: Literal["layer", "token"] = "layer",
) -> torch.Tensor:
    """The loss; (student, teacher) hidden states [batch, length, width], mask [batch, length] or None for all."""
    total = pairs[0][0].new_zeros((), dtype=torch.float32)
    for s, t in pairs:
        s, t = s.float(), t.float()
        if mask is not None:
            s, t = s[mask.bool()], t[mask.bool()]
        error, norm = (s - t).square(), t.square()
        if normalize == "token":
            total = total + (error.mean(dim=-1) / (norm.mean(dim=-1) + eps)).mean()
        else:
            total = total + error.mean() / (norm.mean() + eps)
    return total
