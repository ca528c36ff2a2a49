"""The weight of the task's own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from ...errors import ModelError
from ..base import Modifier

if TYPE_CHECKING:
    from ..session import Session


class TaskLoss(Modifier):
    """Multiply the task's loss (the cross entropy) by a weight, before others add theirs; without it the weight is 1.

    The `hardness` of other libraries: `weight: 0` learns from the teacher alone. It stands before every modifier that
    adds a loss.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    unused: ClassVar[frozenset[str]] = frozenset({"targets", "ignore", "update_frequency"})

    weight: float = Field(default=0.0, ge=0)
    """What the task's loss is multiplied with."""

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
        return self.weight * loss
