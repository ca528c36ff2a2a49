"""Letting the columns of a Linear that stay make up for those that go: least squares on the layer's own inputs."""

from __future__ import annotations

import torch

from ....errors import ModelError
from ..least_squares import conjugate_gradients

STEPS = 50


def compensate(
    weight: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    dampening_frac: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight f32 [out, in] whose columns other than `kept` are 0 and whose output is closest to the old one.

    Minimizes ||W X - W' X||^2 + d ||W'_K - W_K||^2 over the kept columns K; gram = X X^T [in, in], d is
    `dampening_frac` of the mean of its diagonal: W'_K = W_K + W_R G_RK (G_KK + d I)^-1, the optimal brain surgeon's
    update (Hassibi & Stork 1993) for all removed columns R at once. mask: bool [out, in], False where W' must be 0;
    then by conjugate gradients on what it allows. Raises ModelError when the inputs hold NaN or infinity, or when the
    dampening is too weak.
    """
    if not bool(gram.isfinite().all()):
        raise ModelError(
            "calibration inputs hold NaN or infinity; check the model and its data type"
        )
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    inside = gram.double()[kept][:, kept]
    across = gram.double()[gone][:, kept]
    inside.diagonal().add_(dampening_frac * float(inside.diagonal().mean()))
    inside.diagonal()[inside.diagonal() == 0] = 1.0  # no input at all: nothing to learn from
    wanted = weight[:, gone].double() @ across
    if mask is None:
        lower, failed = torch.linalg.cholesky_ex(inside)
        if int(failed):
            raise ModelError(
                f"the inputs' X X^T of {len(kept)} columns has no Cholesky factor with dampening_frac"
                f" {dampening_frac:g}; raise it, or use more calibration samples"
            )
        change = torch.cholesky_solve(wanted.T, lower).T
    else:
        start = torch.zeros_like(wanted)
        change, _ = conjugate_gradients(
            start, wanted, inside, mask.to(weight.device)[:, kept], steps=STEPS, tolerance=1e-6
        )
    result = torch.zeros_like(weight)
    result[:, kept] = weight[:, kept] + change.to(weight.dtype)
    return result
