"""Second-order pruning: remove what a quadratic model of the loss misses least, and let the rest make up for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PrivateAttr

from .gradual import _GradualPruning

if TYPE_CHECKING:
    from ..session import Session

CHUNK = 65536  # Fisher blocks worked on at once


class OBSPruning(_GradualPruning):
    """Optimal BERT Surgeon (Kurtic et al. 2022, arXiv 2203.07259): a block-diagonal empirical Fisher F = mean of g g^T.

    Score: w_q^2 / (2 [F^-1]_qq) (equation 6); the weights of a block that stay take the step that makes up for those
    removed, all together: F_kk^-1 F_kr w_r (the paper adds up single steps). g is each optimizer step's gradient, with
    older ones fading by `decay` (the paper draws new ones before each pruning). F + dampening_frac * mean(diag F) * I
    is inverted. Memory: fisher_block_size floats for each weight. Nothing is removed before the first gradient.
    """

    stages: ClassVar[frozenset[str]] = frozenset({"train"})
    trains_weights: ClassVar[bool] = True

    fisher_block_size: int = Field(default=8, ge=1, le=256)
    """Consecutive weights of a matrix whose curvatures are taken together."""
    decay: float = Field(default=0.95, ge=0, lt=1)
    """How much of F each step keeps of the steps before: 0.95 looks back about 20 steps."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to F's diagonal, as a fraction of its mean."""

    _fisher: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    def on_initialize(self, session: Session) -> None:
        super().on_initialize(session)
        self._fisher = {}

    def on_gradients(self, session: Session) -> None:
        for name, _ in session.weights(self.targets, self.ignore):
            gradient = session.model.get_parameter(name).grad
            if gradient is None:
                continue
            g = blocks(gradient.float(), self.fisher_block_size)
            if name not in self._fisher:
                self._fisher[name] = g.new_zeros(*g.shape, g.shape[1])
            # A state that was loaded is on the CPU.
            self._fisher[name] = self._fisher[name].to(g.device)
            self._fisher[name].mul_(self.decay).baddbmm_(
                g.unsqueeze(2), g.unsqueeze(1), alpha=1.0 - self.decay
            )

    def on_end(self, session: Session) -> None:
        super().on_end(session)
        self._fisher.clear()

    def scores(
        self, session: Session, weights: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor] | None:
        if weights.keys() != self._fisher.keys():
            return None
        scores = {name: self._score(name, weight) for name, weight in weights.items()}
        if self.global_sparsity:  # one threshold for all: in the units of the loss
            scores = {name: score * self._mean(name) for name, score in scores.items()}
        return scores

    def _score(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Equation 6 over the mean of F's diagonal."""
        w = blocks(weight.float(), self.fisher_block_size)
        found = [
            part.square() / (2.0 * torch.linalg.inv(fisher).diagonal(dim1=1, dim2=2))
            for part, fisher in zip(w.split(CHUNK), self._damped(name), strict=True)
        ]
        return torch.cat(found).flatten()[: weight.numel()].reshape(weight.shape)

    def remove(self, name: str, weight: torch.Tensor, mask: torch.Tensor) -> None:
        size = self.fisher_block_size
        w = blocks(weight.float(), size)
        kept = blocks(mask.float(), size).bool()
        after = [
            compensate(part, fisher, keep)
            for part, fisher, keep in zip(
                w.split(CHUNK), self._damped(name), kept.split(CHUNK), strict=True
            )
        ]
        flat = torch.cat(after).flatten()[: weight.numel()].reshape(weight.shape)
        weight.copy_(flat)
        weight.masked_fill_(~mask, 0)

    def _mean(self, name: str) -> float:
        return float(self._fisher[name].diagonal(dim1=1, dim2=2).mean())

    def _damped(self, name: str) -> list[torch.Tensor]:
        """F over its mean diagonal, dampened, in chunks [n, size, size]; the identity where no gradient ever came."""
        fisher = self._fisher[name]
        mean = self._mean(name)
        eye = torch.eye(fisher.shape[1], device=fisher.device)
        if mean == 0:
            return [eye.expand_as(part) for part in fisher.split(CHUNK)]
        return [part / mean + self.dampening_frac * eye for part in fisher.split(CHUNK)]


def blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """[n, size]: a matrix row by row, cut into blocks, the last one filled up with zeros."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)


def compensate(weights: torch.Tensor, fisher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The weights [n, size] after those not `kept` (bool) became zero; fisher [n, size, size], positive definite.

    The change d of those kept minimises d^T F d / 2 of the whole block: F_kk d_k = F_kr w_r.
    """
    removed = weights.masked_fill(kept, 0)
    right = (fisher @ removed.unsqueeze(2)).masked_fill(~kept.unsqueeze(2), 0)
    both = kept.unsqueeze(2) & kept.unsqueeze(1)
    left = fisher.masked_fill(~both, 0) + torch.diag_embed((~kept).float())
    change: torch.Tensor = torch.linalg.solve(left, right).squeeze(2)
    return (weights + change).masked_fill(~kept, 0)
