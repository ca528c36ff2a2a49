"""The inputs of a Linear as integers will have them: what GPTQ needs of the rounded and the unrounded ones."""

from __future__ import annotations

import torch

from ..hessian import Gram
from .layer import fake_quantize_dynamic, fake_quantize_static
from .observers import MinMax
from .schemes import InputArgs


class RoundedInputs:
    """Observer of a Linear's input X [..., in]: X'^T X' and X'^T (X - X'), X' being its values on their grid.

    arguments: None where the scheme leaves inputs alone, then X' = X. static: their observer where they are static.
    """

    def __init__(self, arguments: InputArgs | None, static: MinMax | None) -> None:
        self.arguments = arguments
        self.gram = Gram()
        self._static = static.qparams() if static else None
        self._lost: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rounded = self._round(rows)
        self.gram.add(rounded)
        if rounded is not rows:
            if self._lost is None:
                self._lost = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._lost.addmm_(rounded.T, rows - rounded)

    def _round(self, rows: torch.Tensor) -> torch.Tensor:
        if self.arguments is None:
            return rows
        if self._static is None:
            return fake_quantize_dynamic(rows)
        scale, zero_point = self._static
        return fake_quantize_static(rows, scale.to(rows.device), zero_point.to(rows.device))

    def target(self, weight: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] that makes of X' what is nearest to `weight` on X: W + W (X - X')^T X' G^-1.

        damped: X'^T X' with something added to its diagonal, which pulls the result towards `weight`.
        """
        if self._lost is None:
            return weight
        lower = torch.linalg.cholesky(damped)
        return weight + torch.cholesky_solve(self._lost @ weight.T, lower).T
