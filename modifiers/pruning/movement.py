"""Movement pruning: remove the weights that training moves towards zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import PrivateAttr

from .gradual import _GradualPruning

if TYPE_CHECKING:
    from ..session import Session


class MovementPruning(_GradualPruning):
    """Movement pruning (Sanh et al. 2020, arXiv 2005.07683, equation 2): score = sum over steps of -w * dL/dw.

    A weight that gradient descent makes larger scores high, one that it draws towards zero low, whatever its size.
    Scores add up over every step of the window. Unlike the paper's, a removed weight never comes back. Nothing is
    removed before the first gradient: a sparsity due then comes at the next update.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    trains_weights: ClassVar[bool] = True

    _scores: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)
        self._scores = {}

    def on_gradients(self, session: Session) -> None:
        for name, weight in session.weights(self.targets, self.ignore):
            gradient = session.model.get_parameter(name).grad
            if gradient is None:
                continue
            if name not in self._scores:
                self._scores[name] = torch.zeros_like(weight, dtype=torch.float32)
            self._scores[name] = self._scores[name].to(weight.device)  # loaded on the CPU
            self._scores[name].addcmul_(weight.float(), gradient.float(), value=-1.0)

    def on_end(self, session: Session) -> None:
        super().on_end(session)
        self._scores.clear()

    def scores(
        self, session: Session, weights: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        if weights.keys() != self._scores.keys():
            return None
        return {name: self._scores[name].to(weight.device) for name, weight in weights.items()}
