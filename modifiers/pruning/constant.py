"""Keep the zeros a model already has."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..base import Modifier

if TYPE_CHECKING:
    from ..session import Session


class ConstantPruning(Modifier):
    """Hold every zero weight at zero: mask = (weight != 0), in weights, gradients and optimizer moments.

    A matrix whose mask is held already (pruned by an earlier stage) keeps that mask; one without zeros has none.
    """

    unused: ClassVar[frozenset[str]] = frozenset({"update_frequency"})

    def on_start(self, session: Session) -> None:
        self._hold(session)

    def on_update(self, session: Session) -> None:
        self._hold(session)

    def _hold(self, session: Session) -> None:
        for name, weight in session.weights(self.targets, self.ignore):
            kept = weight != 0
            if name not in session.masks and not kept.all():
                session.masks.hold(name, kept)
