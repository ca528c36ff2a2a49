"""What distilling modifiers share: the teacher, loaded once, run once per batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from ...errors import ModelError
from ..base import Modifier

if TYPE_CHECKING:
    from ..session import Session


class _Distilling(Modifier):
    """A loss against a teacher; several with the same teacher share its forward."""

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    unused: ClassVar[frozenset[str]] = frozenset({"targets", "ignore", "update_frequency"})
    asks_for: ClassVar[str | None] = None
    """What it needs besides logits, as the model's forward calls it: `output_hidden_states`."""

    teacher: str
    """The teacher: zoo:..., a Hugging Face id, a folder, or `self`, the model before the recipe."""
    weight: float = Field(default=1.0, gt=0)
    """What the loss is multiplied with before it is added to the total."""

    def on_initialize(self, session: Session) -> None:
        self.load(session)

    def on_finalize(self, session: Session) -> None:
        session.teachers.pop(self.teacher, None)

    def load(self, session: Session) -> nn.Module:
        """The teacher, frozen and in evaluation mode; loaded by the first that asks."""
        if self.teacher not in session.teachers:
            if session.load_teacher is None:
                raise ModelError(
                    f"{session.label(self)} needs its teacher {self.teacher!r}, but the session has no load_teacher;"
                    " set session.load_teacher to a function from a reference to a model"
                )
            teacher = session.load_teacher(self.teacher)
            session.teachers[self.teacher] = teacher.to(session.device).eval().requires_grad_(False)
        return session.teachers[self.teacher]

    def teacher_outputs(
        self, session: Session, batch: Mapping[str, Any], of: object = "the batch"
    ) -> Any:
        """The teacher's outputs, computed once for all who share it; `of` names which rows `batch` has."""
        key = f"teacher {self.teacher} of {of}"
        if key not in session.per_batch:
            wanted = {
                other.asks_for: True
                for other in session.modifiers
                if isinstance(other, _Distilling)
                and other.teacher == self.teacher
                and other.asks_for
                and session.is_active(other)
            }
            with torch.no_grad():
                session.per_batch[key] = self.load(session)(
                    **model_inputs(batch), use_cache=False, **wanted
                )
        return session.per_batch[key]

    def log_loss(self, session: Session, name: str, value: torch.Tensor) -> None:
        """Log this part of the loss, before its weight; a second modifier of the kind gets a name of its own."""
        number = session.label(self).partition("#")[2]
        session.log(f"loss/{name}{number and '#' + number}", value.detach())


def model_inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What of a batch a forward takes. Packed rows bring `position_ids` that begin anew with each sequence.

    `transformers` keeps such sequences apart only where it gets no attention mask.
    """
    names = ["input_ids", "position_ids" if "position_ids" in batch else "attention_mask"]
    return {name: batch[name] for name in names if name in batch}
