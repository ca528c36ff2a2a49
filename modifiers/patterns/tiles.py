"""`n:16`: n of every 16 inputs kept, with an n of its own for every tile of 16 rows x 16 inputs."""

from __future__ import annotations

import torch

from ..mask_structure import Chooser, MaskStructure

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
        return self.keep(scores, self.counts(scores, sparsity))

    def counts(self, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        """n of each tile, int64 [out / 16, in / 16], for scores [out, in]."""
        down, across = scores.shape[0] // SIDE, scores.shape[1] // SIDE
        rows = scores.clamp_min(0).reshape(down, SIDE, across, SIDE).sort(dim=3, descending=True)
        steps = rows.values.unflatten(3, (-1, QUANTUM)).sum(dim=(1, 4)).reshape(-1)
        kept = round((1 - sparsity) * len(steps))
        # Stable, and a tile's steps stand in falling order: none is taken before the one under it.
        best = steps.argsort(descending=True, stable=True)[:kept]
        taken = torch.zeros(len(steps), dtype=torch.int64, device=scores.device)
        taken[best] = QUANTUM
        return taken.reshape(down, across, -1).sum(dim=2)

    def keep(self, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The mask of scores [out, columns], n of each tile given: the best of each row; of equals, the rightmost."""
        windows = scores.reshape(scores.shape[0], -1, SIDE)
        order = windows.argsort(dim=2, stable=True)
        place = torch.arange(SIDE, device=scores.device) >= SIDE - counts.repeat_interleave(
            SIDE, dim=0
        ).unsqueeze(2)
        kept = torch.zeros_like(windows, dtype=torch.bool).scatter_(2, order, place)
        return kept.reshape(scores.shape)

    def chooser(self, scores: torch.Tensor, sparsity: float) -> Chooser:
        """The tiles' budget is the matrix', so their n is settled by the scores at the start; which n, when reached."""
        counts = self.counts(scores, sparsity)

        def choose(first: int, window: torch.Tensor) -> torch.Tensor:
            tiles = slice(first // SIDE, (first + window.shape[1]) // SIDE)
            return self.keep(window, counts[:, tiles])

        return choose
