"""SparseGPT: prune column by column, correcting the columns to the right for each error made."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from ..hessian import Gram, inverse_factor
from ..precision import fast_float32
from .calibrated import Layer, _CalibratedPruning

INNER = 32  # columns x 3072 rows in fp32 stay in a second-level cache


class SparseGPT(_CalibratedPruning):
    """SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1): one-shot pruning with weight updates.

    The mask is chosen per Linear within each block of `block_size` columns (N:M: every M columns) by W^2 / diag(U)^2.
    Zeros that are there already stay zero and count towards the sparsity.
    """

    block_size: int = Field(default=128, ge=1)
    """Columns whose mask is chosen at once and whose updates to the rest are applied together."""
    dampening_frac: float = Field(default=0.01, gt=0)
    """Added to the Hessian's diagonal, as a fraction of its mean."""

    def prune(
        self,
        gram: Gram,
        layers: list[Layer],
        notes: dict[str, Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        factor = inverse_factor(gram.hessian, self.dampening_frac)
        if factor.double:
            notes["cholesky"] = f"fp32 failed; fp64 with dampening_frac {factor.dampening:g}"
        alive = torch.cat([layer.kept for layer in layers]) & ~factor.dead
        with _one_thread(), fast_float32():
            weight, mask = eliminate(
                torch.cat([layer.weight for layer in layers]),
                alive,
                layers,
                factor.upper,
                self.block_size,
            )
        rows = [layer.weight.shape[0] for layer in layers]
        return list(zip(weight.split(rows), mask.split(rows), strict=True))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The column loop makes thousands of small operations; threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def eliminate(
    weight: torch.Tensor,
    kept: torch.Tensor,
    layers: list[Layer],
    upper: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column loop over stacked matrices: weight f32 [rows, in], upper = chol(H^-1), f32 [in, in].

    kept: bool [rows, in], False for weights that must become zero. Returns the new weight and the mask.
    Works on the transposed weight, so that a column is contiguous. Updates are lazy at two levels: a column's error
    reaches the rest of its INNER columns at once, those of its block after these, and the others after the block.
    """
    columns = weight.shape[1]
    unit = math.lcm(*(layer.structure.columns for layer in layers))
    block_size, inner = _multiple(block_size, unit), _multiple(INNER, unit)
    w = weight.masked_fill(~kept, 0).T.contiguous()  # [in, rows]
    mask = kept.T.contiguous()
    choices = [_Choice(w, mask, upper.diagonal(), *place) for place in _places(layers)]
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        for choice in choices:
            if choice.step is None:
                choice.make(first, last)
        errors = torch.empty_like(w[first:last])
        for start in range(first, last, inner):
            stop = min(start + inner, last)
            part = errors[start - first : stop - first]
            _eliminate_few(w, mask, upper, choices, start, part)
            w[stop:last].addmm_(upper[start:stop, stop:last].T, part, alpha=-1)
        w[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return w.T.contiguous(), mask.T.contiguous()


def _multiple(size: int, unit: int) -> int:
    """The largest multiple of `unit` up to `size`, at least one: a group must not straddle two blocks."""
    return max(unit, size - size % unit)


def _eliminate_few(
    w: torch.Tensor,
    mask: torch.Tensor,
    upper: torch.Tensor,
    choices: list[_Choice],
    start: int,
    errors: torch.Tensor,
) -> None:
    """The columns from `start` on that `errors` [columns, rows] is for; those after them are left as they are."""
    stop = start + len(errors)
    steps = [choice.step for choice in choices if choice.step is not None]
    group = math.gcd(*steps) or len(errors)
    for first in range(start, stop, group):
        last = min(first + group, stop)
        for choice in choices:
            if choice.step is not None and first % choice.step == 0:
                choice.make(first, first + choice.step)
        # 1 / U_jj where a weight goes and 0 where it stays: one product is a column's errors
        removed = (~mask[first:last]).float().div_(upper.diagonal()[first:last].unsqueeze(1))
        for j in range(first, last):
            error = torch.mul(w[j], removed[j - first], out=errors[j - start])
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
    w[start:stop].masked_fill_(~mask[start:stop], 0)


def _places(layers: list[Layer]) -> Iterator[tuple[Layer, slice]]:
    """Each layer with its rows of the stack."""
    first = 0
    for layer in layers:
        last = first + layer.weight.shape[0]
        yield layer, slice(first, last)
        first = last


class _Choice:
    """How one layer of the stack gets its mask, by (w / U_jj)^2, as the loop goes on."""

    def __init__(
        self,
        w: torch.Tensor,
        mask: torch.Tensor,
        diagonal: torch.Tensor,
        layer: Layer,
        rows: slice,
    ) -> None:
        """w, mask: [columns, rows], changed by the loop and by `make`."""
        self.w, self.mask, self.diagonal = w[:, rows], mask[:, rows], diagonal.unsqueeze(1)
        self.step = layer.structure.step
        self.choose = layer.structure.chooser(self._scores(slice(None)), layer.sparsity)

    def make(self, first: int, last: int) -> None:
        """Fill the mask of some columns."""
        window = slice(first, last)
        self.mask[window] &= self.choose(first, self._scores(window)).T

    def _scores(self, window: slice) -> torch.Tensor:
        scores = (self.w[window] / self.diagonal[window]).square_()
        return scores.masked_fill_(~self.mask[window], -1.0).T
