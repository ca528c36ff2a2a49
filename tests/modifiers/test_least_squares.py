"""Weights on a fixed mask against a dense solve of each row's own normal equations."""

from __future__ import annotations

import torch

from paring.modifiers.pruning.least_squares import conjugate_gradients


def problem(rows: int = 7, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(80, columns) @ torch.randn(columns, columns)
    matrix = x.T @ x / 80 + 0.1 * torch.eye(columns)
    mask = torch.rand(rows, columns) > 0.4
    mask[3] = False  # nothing to solve
    return torch.randn(rows, columns) @ matrix, matrix, mask


def plain(target: torch.Tensor, matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    solution = torch.zeros_like(target, dtype=torch.float64)
    for row, free in enumerate(mask):
        if free.any():
            part = matrix[free][:, free].double()
            solution[row, free] = torch.linalg.solve(part, target[row, free].double())
    return solution.float()


def test_to_tolerance_it_is_the_optimum_of_every_row():
    target, matrix, mask = problem()
    expected = plain(target, matrix, mask)
    start = torch.randn_like(target) * mask
    found, steps = conjugate_gradients(start, target, matrix, mask, steps=200, tolerance=1e-6)
    assert steps < 200
    assert torch.allclose(found, expected, atol=1e-3)
    assert (found[~mask] == 0).all()
    again, steps = conjugate_gradients(found, target, matrix, mask, steps=200, tolerance=1e-5)
    assert steps == 0
    assert torch.equal(again, found)


def test_every_step_lowers_the_energy():
    target, matrix, mask = problem()
    energies = []
    for steps in range(6):
        w, taken = conjugate_gradients(
            torch.zeros_like(target), target, matrix, mask, steps=steps, tolerance=0.0
        )
        assert taken == steps
        energies.append(float(((w @ matrix / 2 - target) * w).sum()))
    assert energies == sorted(energies, reverse=True)
    assert energies[5] < energies[0]


def test_solved_rows_wait_for_the_others_without_harm():
    target, matrix, mask = problem()
    target[0] = 0
    found, _ = conjugate_gradients(
        torch.zeros_like(target), target, matrix, mask, steps=60, tolerance=0.0
    )
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert torch.allclose(found, plain(target, matrix, mask), atol=1e-3)
