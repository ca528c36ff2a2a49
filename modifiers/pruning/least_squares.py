"""The best weights on a fixed mask: masked normal equations by conjugate gradients, all rows of a matrix at once."""

from __future__ import annotations

import torch


def conjugate_gradients(
    weight: torch.Tensor,
    target: torch.Tensor,
    matrix: torch.Tensor,
    mask: torch.Tensor,
    *,
    steps: int,
    tolerance: float,
) -> tuple[torch.Tensor, int]:
    """Minimise each row's w A w^T / 2 - t w^T over the columns its mask keeps, from `weight` on.

    weight, target: f32 [out, in]; matrix: A, f32 [in, in], symmetric and positive definite on every support; mask: bool
    [out, in], True where a weight is free (`weight` is zero elsewhere). Preconditioned by A's diagonal (Jacobi), as in
    ALPS (Meng et al. 2024, arXiv 2406.07831, algorithm 2). Every step is one product [out, in] x [in, in]. Ends after
    `steps`, or when the residual norm of the worst row is at most `tolerance` of its target's.
    Returns the weights and the number of steps taken.
    """
    free = mask.to(weight.dtype)
    inverse = 1.0 / matrix.diagonal()
    limit = (target * free).norm(dim=1) * tolerance
    solution = weight.clone()
    residual = (target - weight @ matrix).mul_(free)
    direction = residual * inverse
    energy = (residual * direction).sum(dim=1, keepdim=True)
    product, scaled = torch.empty_like(weight), torch.empty_like(weight)
    for step in range(steps):
        if bool((residual.norm(dim=1) <= limit).all()):
            return solution, step
        torch.mm(direction, matrix, out=product).mul_(free)
        curvature = torch.mul(direction, product, out=scaled).sum(dim=1, keepdim=True)
        # a row that is solved has no direction left: 0 / 0 is 0 here
        length = torch.where(curvature > 0, energy / curvature, 0.0)
        solution.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        torch.mul(residual, inverse, out=scaled)
        before = energy
        energy = torch.mul(residual, scaled, out=product).sum(dim=1, keepdim=True)
        direction.mul_(torch.where(before > 0, energy / before, 0.0)).add_(scaled)
    return solution, steps
