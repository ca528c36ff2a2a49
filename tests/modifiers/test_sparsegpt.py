from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from paring.errors import ModelError
from paring.modifiers.hessian import Gram, inverse_factor
from paring.modifiers.pruning.sparsegpt import SparseGPT


def prune(algorithm, gram, weights, kept):
    """What the algorithm makes of some weights that share an input."""
    tasks = [algorithm.layer("", *pair) for pair in zip(weights, kept, strict=True)]
    return algorithm.prune(gram, tasks, {})


def layer(rows: int = 12, columns: int = 32, tokens: int = 200) -> tuple[torch.Tensor, Gram]:
    torch.manual_seed(0)
    mix = torch.randn(columns, columns)
    gram = Gram()
    for _ in range(4):
        x = torch.randn(1, tokens // 4, columns) @ mix
        gram.add(x)
    return torch.randn(rows, columns), gram


def plain_sparsegpt(weight, gram, block_size, choose):
    """Optimal brain surgeon with a fixed column order, each row for itself, with explicit inverse updates, in fp64.

    choose(scores of the columns [first, last) at this moment) -> kept, called at multiples of block_size.
    """
    w = weight.double().numpy().copy()
    h = 2 / gram.tokens * gram.matrix.double().numpy()
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    columns = w.shape[1]
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(columns)]  # of what is left at column j
    kept = np.ones(w.shape, dtype=bool)
    for j in range(columns):
        if j % block_size == 0:
            last = min(j + block_size, columns)
            scores = np.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in range(j, last)], axis=1)
            kept[:, j:last] = choose(torch.from_numpy(scores)).numpy()
        for row in range(w.shape[0]):
            if not kept[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                w[row, j] = 0
    return torch.from_numpy(w).float(), torch.from_numpy(kept)


def lowest_half(scores: torch.Tensor) -> torch.Tensor:
    order = scores.flatten().argsort()
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[order[: scores.numel() // 2]] = False
    return kept.reshape(scores.shape)


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_unstructured_is_the_plain_algorithm(block_size):
    weight, gram = layer()
    all_kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(
        SparseGPT(sparsity=0.5, block_size=block_size), gram, [weight], [all_kept]
    )
    expected, kept = plain_sparsegpt(weight, gram, block_size, lowest_half)
    assert torch.equal(mask, kept)
    assert torch.allclose(after, expected, atol=1e-4)
    assert (after == 0).sum() == weight.numel() // 2


def test_lazy_updates_at_both_levels_are_the_plain_algorithm():
    weight, gram = layer(columns=100, tokens=400)
    all_kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(SparseGPT(sparsity=0.5, block_size=72), gram, [weight], [all_kept])
    expected, kept = plain_sparsegpt(weight, gram, 72, lowest_half)
    assert torch.equal(mask, kept)
    assert torch.allclose(after, expected, atol=1e-3)


def test_n_of_m_is_the_plain_algorithm():
    weight, gram = layer()
    all_kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(
        SparseGPT(mask_structure="2:4", block_size=10), gram, [weight], [all_kept]
    )
    expected, kept = plain_sparsegpt(weight, gram, 4, two_of_four)
    assert torch.equal(mask, kept)
    assert torch.allclose(after, expected, atol=1e-4)


def test_n_of_m_over_several_blocks_is_the_plain_algorithm():
    weight, gram = layer(columns=96, tokens=400)
    all_kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(
        SparseGPT(mask_structure="2:4", block_size=40), gram, [weight], [all_kept]
    )
    expected, kept = plain_sparsegpt(weight, gram, 4, two_of_four)
    assert torch.equal(mask, kept)
    assert torch.allclose(after, expected, atol=1e-3)


def test_sharing_an_input_changes_nothing():
    weight, gram = layer()
    other = torch.randn(5, 32)
    kept = [torch.ones_like(w, dtype=torch.bool) for w in (weight, other)]
    algorithm = SparseGPT(sparsity=0.6, block_size=16)
    together = prune(algorithm, gram, [weight, other], kept)
    alone = prune(algorithm, gram, [weight], kept[:1]) + prune(algorithm, gram, [other], kept[1:])
    for (w1, m1), (w2, m2) in zip(together, alone, strict=True):
        assert torch.equal(m1, m2)
        assert torch.allclose(w1, w2, atol=1e-5)


def test_updates_beat_the_bare_mask():
    weight, gram = layer()
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(SparseGPT(sparsity=0.5), gram, [weight], [kept])
    assert gram.relative_error(weight, after) < 0.8 * gram.relative_error(weight, weight * mask)


def test_zeros_that_are_there_stay_and_count():
    weight, gram = layer()
    kept = torch.rand(weight.shape) > 0.3
    weight = weight * kept
    ((after, mask),) = prune(SparseGPT(sparsity=0.5), gram, [weight], [kept])
    assert not (mask & ~kept).any()
    assert (after[~kept] == 0).all()
    assert (~mask).float().mean() == 0.5


def test_dead_inputs_become_zero_columns():
    torch.manual_seed(0)
    gram = Gram()
    x = torch.randn(64, 16)
    x[:, 3] = 0
    gram.add(x)
    weight = torch.randn(4, 16)
    kept = torch.ones_like(weight, dtype=torch.bool)
    ((after, mask),) = prune(SparseGPT(sparsity=0.25), gram, [weight], [kept])
    assert (after[:, 3] == 0).all()
    assert not mask[:, 3].any()
    assert after.isfinite().all()


def test_cholesky_falls_back_to_fp64_and_says_so():
    x = torch.tensor([[1e4, 1e4, 1.0], [1e4, 1e4, -1.0]])
    gram = Gram()
    gram.add(x)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram.hessian + 1e-10 * torch.eye(3))
    factor = inverse_factor(gram.hessian, 1e-9)
    assert factor.double
    assert factor.upper.isfinite().all()
    notes: dict[str, str] = {}
    kept = torch.ones(2, 3, dtype=torch.bool)
    algorithm = SparseGPT(sparsity=0.5, dampening_frac=1e-9)
    algorithm.prune(gram, [algorithm.layer("", torch.randn(2, 3), kept)], notes)
    assert "fp64" in notes["cholesky"]


def test_nan_in_calibration_is_an_error():
    gram = Gram()
    x = torch.full((2, 3), torch.nan)
    gram.add(x)
    with pytest.raises(ModelError, match="NaN"):
        inverse_factor(gram.hessian, 0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity is missing"),
        ({"mask_structure": "4:16", "sparsity": 0.5}, "4:16 is 0.75 sparse"),
        ({"mask_structure": "3x3"}, "is not a mask structure"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        SparseGPT(**settings)


def test_half_of_a_wide_gram_is_all_of_it():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 900)
    gram = Gram()
    gram.add(x[:1])
    gram.add(x[1:])
    rows = x.reshape(-1, 900)
    assert gram.tokens == 60
    assert torch.allclose(gram.matrix, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert torch.equal(gram.matrix, gram.matrix.T)
    gram.add(x)
    assert torch.allclose(gram.matrix, 2 * rows.T @ rows, rtol=1e-4, atol=1e-3)
