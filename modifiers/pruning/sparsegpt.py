"""SparseGPT: prune column by column, correcting the columns to the right for each error made."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field

from ..hessian import Gram, inverse_factor
from .calibrated import Layer, _CalibratedPruning


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
        with _one_thread():
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
    Works on the transposed weight, so that a column is contiguous.
    """
    columns = weight.shape[1]
    unit = math.lcm(*(layer.structure.columns for layer in layers))
    block_size = max(unit, block_size - block_size % unit)  # a group must not straddle two blocks
    w = weight.masked_fill(~kept, 0).T.contiguous()  # [in, rows]
    mask = kept.T.contiguous()
    choices = [_Choice(w, mask, upper.diagonal(), *place) for place in _places(layers)]
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        u = upper[first:last, first:last]
        part, mask_part = w[first:last], mask[first:last]
        for choice in choices:
            if choice.step is None:
                choice.make(first, last)
        errors = torch.empty_like(part)
        for j in range(last - first):
            for choice in choices:
                if choice.step is not None and j % choice.step == 0:
                    choice.make(first + j, first + j + choice.step)
            torch.div(part[j].masked_fill(mask_part[j], 0), u[j, j], out=errors[j])
            part[j].masked_fill_(~mask_part[j], 0)
            part[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        w[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return w.T.contiguous(), mask.T.contiguous()


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
