"""Which weights of a matrix to keep, given a score for each: the patterns that the engine's kernels know.

| text | meaning |
|---|---|
| `unstructured` | any weight |
| `N:M` | N kept of every M consecutive inputs of a row: 4:16 is 75 % sparse |
| `RxC` | blocks of R rows x C consecutive inputs are kept or removed as one: 1x4, 4x1, 16x1, 2x1 (rows 2i, 2i + 1) |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator

from ..errors import ModelError

BLOCKS = ("1x4", "4x1", "16x1", "2x1")


@dataclass(frozen=True)
class MaskStructure:
    """A parsed pattern. For N:M, `rows` x `columns` is N and M; for blocks, the block's shape."""

    kind: Literal["unstructured", "N:M", "block"]
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str) -> MaskStructure:
        """Raises ValueError, saying what there is, when `text` is no pattern."""
        if text == "unstructured":
            return cls("unstructured")
        if text in BLOCKS:
            rows, columns = text.split("x")
            return cls("block", int(rows), int(columns))
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match and 0 < int(match[1]) < int(match[2]):
            return cls("N:M", int(match[1]), int(match[2]))
        raise ValueError(
            f"{text!r} is not a mask structure; use unstructured, N:M (N kept of every M inputs, such as 2:4), "
            + " or ".join([", ".join(BLOCKS[:-1]), BLOCKS[-1]])
        )

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes (N:M), else None."""
        return 1.0 - self.rows / self.columns if self.kind == "N:M" else None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ModelError when a weight [out, in] can't be cut into this pattern."""
        down = self.rows if self.kind == "block" else 1
        if shape[0] % down or shape[1] % self.columns:
            text = f"{self.rows}{':' if self.kind == 'N:M' else 'x'}{self.columns}"
            raise ModelError(
                f"{name} is {shape[0]} x {shape[1]}, which {text} does not divide; put it in `ignore` or choose"
                " another mask_structure"
            )

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        """Keep the weights (or blocks, by the sum of their scores) that score highest.

        scores: [out, in], >= 0; a negative score removes a weight before all others. Returns bool [out, in].
        Exactly round(sparsity * n) of the n weights or blocks are removed (per row of them with `per_row`); among
        equal scores, those further left and up go first. N:M removes round(sparsity * M) of every M.
        """
        if self.kind == "N:M":
            groups = scores.reshape(-1, self.columns)
            kept = _keep_highest(groups, round(sparsity * self.columns))
            return kept.reshape(scores.shape)
        if self.kind == "block":
            rows, columns = scores.shape[0] // self.rows, scores.shape[1] // self.columns
            sums = scores.reshape(rows, self.rows, columns, self.columns).sum(dim=(1, 3))
            kept = MaskStructure("unstructured").mask(sums, sparsity, per_row=per_row)
            return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        rows_of = scores if per_row else scores.reshape(1, -1)
        return _keep_highest(rows_of, round(sparsity * rows_of.shape[1])).reshape(scores.shape)


def _keep_highest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """bool [rows, n]: exactly `removed` of each row are False, the lowest; of equals, the leftmost."""
    if removed <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if removed >= scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[1] <= 64:
        order = scores.argsort(dim=1, stable=True)
        kept = torch.ones_like(scores, dtype=torch.bool)
        return kept.scatter_(1, order[:, :removed], False)
    limit = scores.kthvalue(removed, dim=1, keepdim=True).values
    kept = scores > limit
    surplus = scores.shape[1] - removed - kept.sum(dim=1)
    for row in (
        surplus.nonzero().flatten().tolist()
    ):  # ties at the limit: the rightmost of them stay
        ties = (scores[row] == limit[row]).nonzero().flatten()
        kept[row, ties[len(ties) - int(surplus[row]) :]] = True
    return kept


def _known(text: str) -> str:
    MaskStructure.parse(text)
    return text


MaskStructureName = Annotated[str, AfterValidator(_known)]
"""The type of a recipe's `mask_structure`."""
