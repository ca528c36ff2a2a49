"""The integer solvers against plain, slow references."""

from __future__ import annotations

import itertools

import pytest
import torch

from paring.modifiers.hessian import inverse_factor
from paring.modifiers.quantization.layer import dequantize_weight, quantize_weight
from paring.modifiers.quantization.rounding import (
    eliminate,
    refit_scales,
    squared_error,
    sweep,
)

DAMPENING = 0.01


def problem(rows: int = 6, columns: int = 24, groups: int = 3, bits: int = 4):
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(200, columns, generator=generator) @ mix
    kept = torch.rand(rows, columns, generator=generator) > 0.3
    amax = (
        weight.reshape(rows, groups, -1).abs().amax(dim=2) * 0.9
    )  # a tenth is clipped; no ties at the end
    scale = (amax / ((2**bits - 1) / 2)).half().float()
    return weight * kept, kept, scale, inputs.T @ inputs


def plain_gptq(
    weight: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    order: list[int],
) -> torch.Tensor:
    """Equation 2 and 3 of the paper: after each column the inverse is taken anew, of the columns that are left."""
    limit = 2 ** (bits - 1)
    size = weight.shape[1] // scale.shape[1]
    w, hessian = weight.double().clone(), gram.double().clone()
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean())
    q = torch.zeros_like(w)
    for done, column in enumerate(order):
        left = order[done:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        for row in range(w.shape[0]):
            s = float(scale[row, column // size])
            best = max(-limit, min(limit - 1, round(float(w[row, column]) / s)))
            q[row, column] = best if kept[row, column] else 0
            error = (w[row, column] - q[row, column] * s) / inverse[0, 0]
            w[row, left] -= error * inverse[0]
    return q.float()


@pytest.mark.parametrize("block_size", [5, 8, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_column_loop_is_gptq_with_explicit_inverses(block_size, bits, ordered):
    weight, kept, scale, gram = problem(bits=bits)
    order = gram.diagonal().argsort(descending=True) if ordered else torch.arange(24)
    expected = plain_gptq(weight, kept, scale, gram, bits, order.tolist())
    upper = inverse_factor(gram[order][:, order], DAMPENING).upper
    q = eliminate(weight, kept, scale, upper, bits, block_size, order if ordered else None)
    assert torch.equal(q, expected)
    assert (q[~kept] == 0).all()
    rounded = quantize_weight(weight, scale, bits)
    assert squared_error(q, weight, scale, gram) < squared_error(rounded, weight, scale, gram)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_sweep_sets_each_integer_to_the_best_one_given_the_others(bits, monkeypatch):
    monkeypatch.setattr("paring.modifiers.quantization.rounding.BLOCK", 7)
    weight, kept, scale, gram = problem(bits=bits)
    limit = 2 ** (bits - 1)
    start = quantize_weight(weight, scale, bits)
    expected = start.clone()
    for row, column in itertools.product(range(6), range(24)):
        if not kept[row, column]:
            continue
        trials = expected[row].repeat(2 * limit, 1)
        trials[:, column] = torch.arange(-limit, limit)
        scales = scale[row].expand(2 * limit, -1)
        change = (dequantize_weight(trials, scales) - weight[row]).double()
        errors = ((change @ gram.double()) * change).sum(dim=1)
        expected[row, column] = float(errors.argmin()) - limit
    q = sweep(start, weight, kept, scale, gram, bits)
    assert torch.equal(q, expected)
    assert (q[~kept] == 0).all()
    assert squared_error(q, weight, scale, gram) < squared_error(start, weight, scale, gram)


def test_refitted_scales_are_the_least_squares_solution():
    weight, _, scale, gram = problem()
    q = quantize_weight(weight, scale, 4)
    q[0, :8] = 0  # a group without a weight keeps its scale
    fitted = refit_scales(q, weight, scale, gram)
    assert fitted[0, 0] == scale[0, 0]
    root = torch.linalg.cholesky(gram.double()).T  # ||root x||^2 = x G x
    for row in range(6):
        groups = [g for g in range(3) if row or g]
        design = torch.zeros(24, 3, dtype=torch.float64)
        for g in range(3):
            design[8 * g : 8 * g + 8, g] = q[row, 8 * g : 8 * g + 8].double()
        target = weight[row].double()
        expected = torch.linalg.lstsq((root @ design)[:, groups], root @ target).solution
        assert torch.allclose(fitted[row, groups].double(), expected, rtol=1e-3)
    assert torch.equal(fitted, fitted.half().float())
    before, after = (squared_error(q, weight, s, gram) for s in (scale, fitted))
    assert after < before


def test_a_scale_that_would_turn_negative_is_kept():
    weight, _, scale, gram = problem()
    q = -quantize_weight(weight, scale, 4)
    assert torch.equal(refit_scales(q, weight, scale, gram), scale)
