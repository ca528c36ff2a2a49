"""`n:16`: n of every 16 inputs kept, with an n of its own for every tile of 16 rows x 16 inputs."""

from __future__ import annotations

import torch

from ..mask_structure import Chooser, MaskStructure, above, sort_columns

SIDE, QUANTUM = 16, 4


class Tiles(MaskStructure):
    """n:16 with n from {0, 4, 8, 12, 16} for each 16 x 16 tile, the same n in each of its rows.

    A matrix keeps more where the scores say, yet every row of a tile has as many weights as the next: a kernel's lanes
    advance together. Raising a tile's n by 4 gains the scores of each row's next best four weights, 64 in all. Those
    gains only fall as n rises, so taking the highest gains of all tiles first is the optimum of a given budget, which
    is met to within half such a step of a matrix (32 weights).
    """

    usage = "n:16 (n of 0, 4, 8, 12, 16 for each 16 x 16 tile)"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.rows = self.columns = self.step = SIDE

    @classmethod
    def named(cls, text: str) -> Tiles | None:
        return cls(text) if text == "n:16" else None

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        """`per_row` changes nothing: the rows of a tile are alike, and tiles are what is free."""
        columns = _columns(scores)
        ordered = sort_columns(columns)
        counts = self._counts(scores.shape, ordered, sparsity)
        return self._keep(scores.shape, columns, ordered, counts)

    def counts(self, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        """n of each tile, int64 [out / 16, in / 16], for scores [out, in]."""
        return self._counts(scores.shape, sort_columns(_columns(scores)), sparsity)

    def _counts(self, shape: torch.Size, ordered: torch.Tensor, sparsity: float) -> torch.Tensor:
        """ordered: [16, windows], rising."""
        down, across = shape[0] // SIDE, shape[1] // SIDE
        fours = ordered.clamp_min(0).flip(0).reshape(SIDE // QUANTUM, QUANTUM, down, SIDE, across)
        steps = fours.sum(dim=(1, 3)).permute(1, 2, 0).reshape(-1)  # [down, across, step], falling
        kept = round((1 - sparsity) * len(steps))
        # Stable, and a tile's steps stand in falling order: none is taken before the one under it.
        best = steps.argsort(descending=True, stable=True)[:kept]
        taken = torch.zeros(len(steps), dtype=torch.int64, device=ordered.device)
        taken[best] = QUANTUM
        return taken.reshape(down, across, -1).sum(dim=2)

    def keep(self, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The mask of scores [out, columns], n of each tile given: the best of each row; of equals, the rightmost."""
        columns = _columns(scores)
        return self._keep(scores.shape, columns, sort_columns(columns), counts)

    def _keep(
        self, shape: torch.Size, columns: torch.Tensor, ordered: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        count = counts.repeat_interleave(SIDE, dim=0).reshape(-1)
        # The highest that is removed; where nothing is, there is none.
        limit = ordered.gather(0, (SIDE - 1 - count).clamp_min(0)[None])[0]
        limit = torch.where(count == SIDE, -torch.inf, limit)
        return above(columns, limit, count).T.reshape(shape)

    def chooser(self, scores: torch.Tensor, sparsity: float) -> Chooser:
        """The tiles' budget is the matrix', so their n is settled by the scores at the start; which n, when reached."""
        counts = self.counts(scores, sparsity)

        def choose(first: int, window: torch.Tensor) -> torch.Tensor:
            tiles = slice(first // SIDE, (first + window.shape[1]) // SIDE)
            return self.keep(window, counts[:, tiles])

        return choose


def _columns(scores: torch.Tensor) -> torch.Tensor:
    """[out, in] -> its windows of 16 inputs as columns, [16, out * in / 16]."""
    return scores.reshape(-1, SIDE).T.contiguous()
