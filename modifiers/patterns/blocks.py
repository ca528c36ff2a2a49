"""`RxC`: blocks of R rows and C consecutive inputs, kept or removed as one."""

from __future__ import annotations

import torch

from ..mask_structure import MaskStructure, keep_highest

SHAPES = ("1x4", "4x1", "16x1", "2x1")


class Blocks(MaskStructure):
    """Blocks by the sum of their weights' scores: 1x4, 4x1, 16x1 of neighbours; 2x1 of rows r and r + 16.

    2x1 is for a kernel that decodes one mask for two panels of 16 rows (the engine packs 16 rows to a panel), so its
    pairs are rows r and r + 16 of every 32. To the pruner any fixed pairing is alike: the order of a layer's outputs
    means nothing to scores.
    """

    usage = ", ".join(SHAPES)
    local = True

    def __init__(self, text: str, height: int, columns: int, stride: int) -> None:
        """A block has rows r, r + stride, ... of every `height * stride`."""
        super().__init__(text)
        self.height, self.columns, self.stride = height, columns, stride
        self.rows = height * stride

    @classmethod
    def named(cls, text: str) -> Blocks | None:
        if text not in SHAPES:
            return None
        height, columns = map(int, text.split("x"))
        return cls(text, height, columns, 16 if text == "2x1" else 1)

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        """Exactly round(sparsity * n) of the n blocks are removed, or of each row of blocks.

        A weight that is gone already adds nothing to its block's score; a block of such weights alone goes first.
        """
        out, columns = scores.shape
        panels, across = out // self.rows, columns // self.columns
        tiles = scores.reshape(panels, self.height, self.stride, across, self.columns)
        sums = tiles.clamp_min(0).sum(dim=(1, 4))  # [panels, stride, across]
        sums.masked_fill_((tiles < 0).all(dim=4).all(dim=1), -1.0)
        blocks = sums.reshape(-1, across) if per_row else sums.reshape(1, -1)
        kept = keep_highest(blocks, round(sparsity * blocks.shape[1])).reshape(sums.shape)
        return kept[:, None, :, :, None].expand(tiles.shape).reshape(scores.shape)
