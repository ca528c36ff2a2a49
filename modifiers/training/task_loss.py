"""The weight of the task's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from ...errors import ModelError
from ..base import Modifier
from .mixture_parts import Parts, rows_of

if TYPE_CHECKING:
    from ..session import Session


class TaskLoss(Modifier):
    """Multiply the task's loss (the cross entropy) by a weight, before others add theirs; without it the weight is 1.

    The `hardness` of other libraries: `weight: 0` learns from the teacher alone. It stands before every modifier that
    adds a loss.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    unused: ClassVar[frozenset[str]] = frozenset({"targets", "ignore", "update_frequency"})

    weight: float = Field(default=1.0, ge=0)
    """What the task's loss is multiplied with."""
    parts: Parts | None = None
    """Only sequences of these parts of the mixture, by their place in it, from 0; not given: all. What the others
    teach then comes from the teacher alone (see Distillation)."""

    @model_validator(mode="after")
    def _check_given(self) -> TaskLoss:
        if not {"weight", "parts"} & self.model_fields_set:
            raise ValueError("give weight (0 learns from the teacher alone), parts, or both")
        return self

    def on_initialize(self, session: Session) -> None:
        for other in session.modifiers:
            if other is self:
                return
            if other.defines("on_loss"):
                raise ModelError(
                    f"{session.label(self)} stands after {session.label(other)}, whose loss it would weigh too; put it"
                    " first"
                )

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        if self.parts is not None:
            rows = rows_of(session, self, self.parts, batch)
            loss = cross_entropy(outputs.logits[rows], batch["labels"][rows])
            session.log("loss/task_parts", loss.detach())
        return self.weight * loss


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean per predicted token, 0 without any; logits [batch, length, vocab], labels [batch, length], -100: no loss."""
    predicted = labels[:, 1:] != -100  # position t predicts label t + 1
    total = functional.cross_entropy(
        logits[:, :-1][predicted].float(), labels[:, 1:][predicted], reduction="sum"
    )
    return total / predicted.sum().clamp_min(1)
