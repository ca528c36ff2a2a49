"""Distillation layer by layer: which layer of the student learns from which of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import ModelError
from .teacher import _Distilling

if TYPE_CHECKING:
    from ..session import Session

Index = Annotated[int, Field(ge=0)]
LayerMap = Literal["uniform", "last"] | Annotated[dict[Index, Index], Field(min_length=1)]
"""A recipe's `layers`."""


class _LayerDistilling(_Distilling):
    """A loss on what the layers compute; the student is asked for it while the window is open."""

    transient: ClassVar[frozenset[str]] = frozenset({"_handle"})

    layers: LayerMap = "uniform"
    """Who learns from whom: `uniform` spreads the student's layers evenly over the teacher's (one to one where both
    have as many), `last` is the last pair alone, {student: teacher} names pairs by block number, from 0."""

    _handle: RemovableHandle | None = PrivateAttr(default=None)

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)

        def ask(
            module: nn.Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            if torch.is_grad_enabled() and session.is_active(self):
                self.prepare(session)
                return args, {**kwargs, str(self.asks_for): True}
            return None

        self._handle = session.model.register_forward_pre_hook(ask, with_kwargs=True)

    def on_finalize(self, session: Session) -> None:
        super().on_finalize(session)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def prepare(self, session: Session) -> None:
        """Before each forward of the student inside the window."""

    def layer_pairs(
        self, session: Session, batch: Mapping[str, Any], outputs: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(student's, teacher's) of each mapped pair. ModelError where a layer is missing or shapes differ."""
        name = str(self.asks_for).removeprefix("output_")
        student = getattr(outputs, name)
        teacher = getattr(self.teacher_outputs(session, batch), name)
        if student is None:
            raise ModelError(
                f"{session.label(self)} got no {name} of the student; call the session's own model with"
                " gradients enabled"
            )
        if name == "hidden_states":  # the first is the embedding's output
            student, teacher = student[1:], teacher[1:]
        pairs = layer_map(self.layers, len(student), len(teacher), session.label(self))
        found = [(student[s], teacher[t]) for s, t in pairs]
        for s, t in found:
            if s.shape != t.shape:
                raise ModelError(
                    f"teacher {self.teacher} has {name} {tuple(t.shape)}, the student {tuple(s.shape)};"
                    f" {session.label(self)} needs them alike: layers may differ in number, not in width or heads"
                )
        return found


def layer_map(layers: LayerMap, students: int, teachers: int, label: str) -> list[tuple[int, int]]:
    """Pairs (student's layer, teacher's layer), both from 0. ModelError when a named one does not exist."""
    if layers == "last":
        return [(students - 1, teachers - 1)]
    if (
        layers == "uniform"
    ):  # layer i of n ends where the teacher's i/n ends, rounded up: last meets last
        return [(i, -(-(i + 1) * teachers // students) - 1) for i in range(students)]
    for side, numbers, count in (
        ("student", layers.keys(), students),
        ("teacher", layers.values(), teachers),
    ):
        if max(numbers) >= count:
            raise ModelError(
                f"{label}: layers names layer {max(numbers)} of the {side}, which has {count}, numbered from 0"
            )
    return sorted(layers.items())
