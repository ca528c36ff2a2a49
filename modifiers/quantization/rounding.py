"""Integers for the weights of a Linear, chosen so that its output changes least: column loop, sweeps, refit of scales.

Everywhere: the squared error of a row w is (s q - w) G (s q - w)^T with G = X^T X of the inputs, q integers, s scales.
"""

from __future__ import annotations

import torch

from .layer import dequantize_weight, half_exact

BLOCK = 128


def column_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales f32 [out, groups] as f32 [in, out], one for each weight of the transposed matrix."""
    return scale.repeat_interleave(columns // scale.shape[1], dim=1).T.contiguous()


def eliminate(
    weight: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    upper: torch.Tensor,
    bits: int,
    block_size: int,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """GPTQ's column loop (Frantar et al. 2022, arXiv 2210.17323, algorithm 1): integers as floats [out, in].

    weight f32 [out, in]; kept bool [out, in], False where the integer must be 0; scale f32 [out, groups];
    upper = chol(G^-1) f32 [in, in], of the columns in `order` (a permutation of them) if that is given. Each column is
    rounded, and the columns after it make up for the error. Works on the transposed weight: a column is contiguous.
    """
    limit = 2 ** (bits - 1)
    columns = weight.shape[1]
    w, keep, s = weight.T.contiguous(), kept.T, column_scales(scale, columns)
    if order is not None:
        w, keep, s = w[order], keep[order], s[order]
    q = torch.empty_like(w)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        u, part = upper[first:last, first:last], w[first:last]
        errors = torch.empty_like(part)
        for j in range(last - first):
            row = q[first + j]
            torch.div(part[j], s[first + j], out=row)
            row.round_().clamp_(-limit, limit - 1).mul_(keep[first + j])
            torch.addcmul(part[j], row, s[first + j], value=-1, out=errors[j])
            errors[j].div_(u[j, j])
            part[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        w[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    if order is not None:
        q = torch.empty_like(q).index_copy_(0, order, q)
    return q.T.contiguous()


def sweep(
    q: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """One pass of coordinate descent over the columns (Behdin et al. 2023, QuantEase, arXiv 2309.01885).

    Each integer [out, in] becomes the best one given all others of its row, so the error never grows.
    """
    limit = 2 ** (bits - 1)
    columns = weight.shape[1]
    s = column_scales(scale, columns)
    q, keep = q.T.contiguous(), kept.T
    pull = gram @ (q * s - weight.T)  # [in, out]: half the gradient by value
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        g, part = gram[first:last, first:last], pull[first:last]
        moves = torch.empty_like(part)
        for j in range(last - first):
            row, step = q[first + j], s[first + j]
            best = torch.addcdiv(row, part[j], step * g[j, j], value=-1)
            best.round_().clamp_(-limit, limit - 1).mul_(keep[first + j])
            torch.mul(best.sub(row), step, out=moves[j])
            row.copy_(best)
            part[j + 1 :].addr_(g[j + 1 :, j], moves[j])
        # rows of this block and of those before it are not looked at again
        pull[last:].addmm_(gram[last:, first:last], moves)
    return q.T.contiguous()


def refit_scales(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    """The scales f32 [out, groups] with the least error for these integers, one least-squares problem a row.

    They are `half_exact`. A row keeps its scales where a new one would not be positive, or the error would not shrink.
    """
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    parts = q.reshape(rows, groups, size)
    a = torch.stack(
        [
            (parts[:, g] @ gram[g * size : (g + 1) * size])
            .reshape(rows, groups, size)
            .mul_(parts)
            .sum(dim=2)
            for g in range(groups)
        ],
        dim=1,
    )
    b = (weight @ gram).reshape(rows, groups, size).mul_(parts).sum(dim=2)
    empty = a.diagonal(dim1=1, dim2=2) == 0
    a.diagonal(dim1=1, dim2=2).masked_fill_(empty, 1.0)
    a, b = a.double(), torch.where(empty, scale, b).double()
    fitted, failed = torch.linalg.solve_ex(a, b)
    fitted = half_exact(fitted.float()).double()
    quadratic = torch.einsum

    def error(s: torch.Tensor) -> torch.Tensor:
        return quadratic("rg,rgh,rh->r", s, a, s) - 2 * (s * b).sum(dim=1)

    better = (failed == 0) & (fitted > 0).all(dim=1) & (error(fitted) < error(scale.double()))
    return torch.where(better[:, None], fitted.float(), scale)


def squared_error(
    q: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor
) -> float:
    """The sum of the rows' squared errors."""
    change = dequantize_weight(q, scale) - weight
    return float(((change @ gram) * change).sum())
