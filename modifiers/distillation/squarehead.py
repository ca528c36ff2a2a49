"""SquareHead: distillation on every layer's hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import ModelError
from .teacher import _Distilling

if TYPE_CHECKING:
    from ..session import Session


class SquareHead(_Distilling):
    """SquareHead (Kurtic et al. 2023, arXiv 2310.06927, equation 1): the layers' squared errors, each normalised.

    sum over layers of mean((Hs - Ht)^2) / (mean(Ht^2) + eps), over tokens with attention_mask 1; the embedding output
    is left out.
    """

    wants_hidden_states: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"_handle"})

    eps: float = Field(default=2.0**-7, gt=0)
    """Guards the division; the default is bfloat16's step at 1."""

    _handle: RemovableHandle | None = PrivateAttr(default=None)

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)

        def ask(
            module: nn.Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            if torch.is_grad_enabled() and session.is_active(self):
                return args, {**kwargs, "output_hidden_states": True}
            return None

        self._handle = session.model.register_forward_pre_hook(ask, with_kwargs=True)

    def on_finalize(self, session: Session) -> None:
        super().on_finalize(session)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        teacher = self.teacher_outputs(session, batch).hidden_states[1:]
        student = outputs.hidden_states
        if student is None:
            raise ModelError(
                "SquareHead got no hidden states of the student; call the session's own model with gradients enabled"
            )
        student = student[1:]
        if len(teacher) != len(student) or teacher[0].shape != student[0].shape:
            raise ModelError(
                f"teacher {self.teacher} has {len(teacher)} layers of width {teacher[0].shape[-1]}, the student"
                f" {len(student)} of {student[0].shape[-1]}; SquareHead needs the same"
            )
        mask = batch.get("attention_mask")
        square = square_head(student, teacher, mask, self.eps)
        session.log("loss/squarehead", square.detach())
        return loss + self.weight * square


def square_head(
    student: tuple[torch.Tensor, ...],
    teacher: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The loss; hidden states [batch, length, width] per layer, attention_mask [batch, length] or None for all."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        s, t = s.float(), t.float()
        if attention_mask is not None:
            chosen = attention_mask.bool()
            s, t = s[chosen], t[chosen]
        total = total + (s - t).square().mean() / (t.square().mean() + eps)
    return total
