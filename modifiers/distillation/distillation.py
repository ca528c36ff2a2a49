"""Distillation on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch.nn.functional import kl_div, log_softmax

from ...errors import ModelError
from .teacher import _Distilling

if TYPE_CHECKING:
    from ..session import Session


class Distillation(_Distilling):
    """Add KL(teacher || student) of the next-token distributions (Hinton et al. 2015, arXiv 1503.02531).

    Times temperature^2, averaged over the tokens that the task's loss is on (labels other than -100).
    """

    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it."""

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        teacher = self.teacher_outputs(session, batch).logits
        student = outputs.logits
        if teacher.shape != student.shape:
            raise ModelError(
                f"teacher {self.teacher} gives logits {tuple(teacher.shape)}, the student {tuple(student.shape)};"
                " both need one vocabulary"
            )
        kl = divergence(student, teacher, batch["labels"], self.temperature)
        session.log("loss/kl", kl.detach())
        return loss + self.weight * kl


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher || student) * T^2 per predicted token; logits [batch, length, vocab], labels [batch, length]."""
    predicted = labels[:, 1:] != -100  # position t predicts label t + 1
    s = log_softmax(student[:, :-1][predicted].float() / temperature, dim=-1)
    t = log_softmax(teacher[:, :-1][predicted].float() / temperature, dim=-1)
    total = kl_div(s, t, reduction="sum", log_target=True)
    return total * temperature**2 / predicted.sum().clamp_min(1)
