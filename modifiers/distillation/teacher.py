"""What distilling modifiers share: the teacher, loaded once, run once per batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from ...errors import ModelError
from ..base import Modifier

if TYPE_CHECKING:
    from ..session import Session


class _Distilling(Modifier):
    """A loss against a teacher; several with the same teacher share its forward."""

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    wants_hidden_states: ClassVar[bool] = False

    teacher: str
    """The teacher: zoo:..., a Hugging Face id, or a folder."""
    weight: float = Field(default=1.0, gt=0)
    """What the loss is multiplied with before it is added to the total."""

    def on_initialize(self, session: Session) -> None:
        if self.teacher in session.teachers:
            return
        if session.load_teacher is None:
            raise ModelError(
                f"{session.label(self)} needs its teacher {self.teacher!r}, but the session has no load_teacher;"
                " set session.load_teacher to a function from a reference to a model"
            )
        teacher = session.load_teacher(self.teacher)
        session.teachers[self.teacher] = teacher.eval().requires_grad_(False)

    def on_finalize(self, session: Session) -> None:
        session.teachers.pop(self.teacher, None)

    def teacher_outputs(self, session: Session, batch: Mapping[str, Any]) -> Any:
        """The teacher's outputs for the batch, computed once for all who share it."""
        key = f"teacher {self.teacher}"
        if key not in session.per_batch:
            hidden = any(
                isinstance(other, _Distilling)
                and other.teacher == self.teacher
                and other.wants_hidden_states
                and session.is_active(other)
                for other in session.modifiers
            )
            inputs = {
                k: v
                for k, v in batch.items()
                if k in ("input_ids", "attention_mask", "position_ids")
            }
            with torch.no_grad():
                session.per_batch[key] = session.teachers[self.teacher](
                    **inputs, use_cache=False, output_hidden_states=hidden
                )
        return session.per_batch[key]
