from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paring.engine.perplexity import answer_perplexity, negative_log_likelihood, perplexity
from paring.errors import DataError

VOCABULARY = 50


def table_logits(ids: list[int]) -> np.ndarray:
    """A bigram model: the row of each token."""
    table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    return table[ids] * 3


def torch_loss(ids: list[int], first: int = 1) -> torch.Tensor:
    logits = torch.from_numpy(table_logits(ids)).double()
    return torch.nn.functional.cross_entropy(
        logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="sum"
    )


def test_windows_do_not_overlap_and_skip_their_first_token() -> None:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 1000).tolist()
    found = perplexity(table_logits, tokens, window=150, windows=6)
    parts = [tokens[i * 150 : (i + 1) * 150] for i in range(6)]
    expected = math.exp(float(sum(torch_loss(part) for part in parts)) / (6 * 149))
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.windows) == (6 * 149, 6)


def test_default_is_the_protocol() -> None:
    asked: list[int] = []

    def uniform(ids: list[int]) -> np.ndarray:
        asked.append(len(ids))
        return np.zeros((len(ids), 8), np.float32)

    found = perplexity(uniform, [3] * (512 * 41))
    assert found.value == pytest.approx(8.0)
    assert asked == [512] * 40


def test_answers_only() -> None:
    generator = np.random.default_rng(2)
    items = [
        (
            generator.integers(0, VOCABULARY, p).tolist(),
            generator.integers(0, VOCABULARY, a).tolist(),
        )
        for p, a in ((5, 3), (1, 70), (9, 1))
    ]
    found = answer_perplexity(table_logits, items)
    total = float(sum(torch_loss(prompt + answer, len(prompt)) for prompt, answer in items))
    assert found.value == pytest.approx(math.exp(total / 74), rel=1e-6)
    assert (found.tokens, found.windows) == (74, 3)


def test_huge_logits_neither_overflow_nor_lose_digits() -> None:
    logits = np.array([[1e4, 1e4 - 1, 0.0]], np.float32)
    assert negative_log_likelihood(logits, [1]) == pytest.approx(math.log(1 + math.e), rel=1e-6)
    wrong = np.array([[0.0, 1e9]], np.float32)
    assert (
        perplexity(lambda ids: np.repeat(wrong, len(ids), axis=0), [0, 0], 2, 1).value == math.inf
    )


def test_too_few_tokens() -> None:
    with pytest.raises(DataError, match="1 windows of 512, not 2"):
        perplexity(table_logits, [1] * 1000, windows=2)
    with pytest.raises(DataError, match="item 1"):
        answer_perplexity(table_logits, [([1], [])])
    with pytest.raises(DataError, match="no items"):
        answer_perplexity(table_logits, [])


def test_progress_counts_windows() -> None:
    calls: list[tuple[str, int, int]] = []
    perplexity(table_logits, [1] * 30, 10, 3, lambda *call: calls.append(call[:3]))
    assert calls == [("perplexity", i, 3) for i in (1, 2, 3)]
