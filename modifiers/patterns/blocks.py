"""`RxC`: blocks of R rows and C consecutive inputs, kept or removed as one."""

from __future__ import annotations

import torch

from ..mask_structure import MaskStructure, keep_highest

SHAPES = ("1x4", "4x1", "16x1", "2x1")


class Blocks(MaskStructure):
    """Blocks by the sum of their weights' scores.

    2x1 pairs neighbours because the engine decodes one mask for rows 2i and 2i + 1 of a panel of 16. To the pruner any
    fixed pairing is alike: the order of a layer's outputs means nothing to scores.
    """

    usage = ", ".join(SHAPES)
    local = True

    def __init__(self, text: str, rows: int, columns: int) -> None:
        super().__init__(text)
        self.rows, self.columns = rows, columns

    @classmethod
    def named(cls, text: str) -> Blocks | None:
        if text not in SHAPES:
            return None
        rows, columns = map(int, text.split("x"))
        return cls(text, rows, columns)

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        """Exactly round(sparsity * n) of the n blocks are removed, or of each row of blocks.

        A weight that is gone already adds nothing to its block's score; a block of such weights alone goes first.
        """
        out, columns = scores.shape
        across = columns // self.columns
        tiles = scores.reshape(out // self.rows, self.rows, across, self.columns)
        sums = tiles.clamp_min(0).sum(dim=(1, 3))  # [down, across]
        sums.masked_fill_((tiles < 0).all(dim=3).all(dim=1), -1.0)
        blocks = sums if per_row else sums.reshape(1, -1)
        kept = keep_highest(blocks, round(sparsity * blocks.shape[1])).reshape(sums.shape)
        return kept[:, None, :, None].expand(tiles.shape).reshape(scores.shape)
