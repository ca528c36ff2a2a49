"""What a Linear's inputs look like: X^T X over the calibration tokens, and the factor SparseGPT and GPTQ need of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ModelError
from .precision import fast_float32

PANEL = 256


class Gram:
    """Accumulates X^T X in fp32. `add` is an observer of a Linear: its input is [..., in].

    X^T X is symmetric, so only blocks on and right of the diagonal are computed: of 1536 columns, 7/12 of the work.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: torch.Tensor | None = None
        self._matrix: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[1], rows.shape[1])
        with fast_float32():
            for first in range(0, rows.shape[1], PANEL):
                panel = slice(first, first + PANEL)
                self._sum[panel, first:].addmm_(rows[:, panel].T, rows[:, first:])
        self._matrix = None
        self.tokens += rows.shape[0]

    @property
    def matrix(self) -> torch.Tensor:
        """X^T X, f32 [in, in]."""
        if self._sum is None:
            raise ModelError("a Linear got no calibration input: the model never called it")
        if self._matrix is None:
            self._matrix = self._sum.triu() + self._sum.triu(1).T
        return self._matrix

    @property
    def hessian(self) -> torch.Tensor:
        """(2 / tokens) X^T X, f32 [in, in]: of the layer's squared output error, per row of weights."""
        return self.matrix * (2.0 / self.tokens)

    def relative_error(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """||(W' - W) X|| ^2 / ||W X||^2; both [out, in]."""
        change = after - before
        with fast_float32():
            lost = ((change @ self.matrix) * change).sum()
            whole = ((before @ self.matrix) * before).sum()
        return float(lost / whole.clamp_min(1e-30))


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor of the inverse Hessian, f32 [in, in], with what it took to compute it."""

    upper: torch.Tensor
    dead: torch.Tensor  # bool [in]: inputs that were always zero
    dampening: float  # the fraction of the mean diagonal that was added
    double: bool  # fp32 failed and fp64 was used


def inverse_factor(hessian: torch.Tensor, dampening_frac: float) -> Factor:
    """U with U^T U = (H + dampening_frac * mean(diag H) * I)^-1 (Frantar & Alistarh 2023, arXiv 2301.00774).

    A column that was always zero gets H_jj = 1. When fp32 fails, fp64 is used, with ten times the dampening until it
    works. Raises ModelError when the inputs hold NaN or infinity, or nothing helps.
    """
    if not bool(hessian.isfinite().all()):
        raise ModelError(
            "calibration inputs hold NaN or infinity; check the model and its data type"
        )
    dead = hessian.diagonal() == 0
    matrix = hessian.clone()
    matrix.diagonal()[dead] = 1.0
    mean = float(matrix.diagonal().mean())
    for attempt in range(8):
        fraction = dampening_frac * 10 ** max(0, attempt - 1)
        double = attempt > 0
        damped = matrix.double() if double else matrix.clone()
        damped.diagonal().add_(fraction * mean)
        # H backwards is M M^T, so H is R R^T with R = M backwards, which is upper, and U = R^-1
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            if bool(upper.isfinite().all()):
                return Factor(upper.float(), dead, fraction, double)
    raise ModelError(
        f"the Hessian of {hessian.shape[0]} inputs has no Cholesky factor even with dampening_frac {fraction:g};"
        " use more calibration samples"
    )
