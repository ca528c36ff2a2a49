"""Perplexity by one protocol, for torch and the engine alike.

Whole texts: tokenized once without special tokens, cut into windows that do not overlap; exp of the mean negative
log-likelihood of the `window - 1` predicted tokens of each window. Prompts with answers: the answers' tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..progress import Progress

Logits: TypeAlias = Callable[[list[int]], NDArray[Any]]
ROWS = 64  # scored at a time: bounds the memory of the exponentials


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp of the mean negative log-likelihood over `tokens` predicted tokens."""

    value: float
    tokens: int
    windows: int


def perplexity(
    logits: Logits,
    tokens: Sequence[int],
    window: int = 512,
    windows: int = 40,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity over the first `windows` windows of `tokens`.

    logits: token ids of one window -> [window, vocabulary]. Raises DataError when there are too few tokens.
    """
    if window < 2 or windows < 1:
        raise DataError(f"perplexity: {windows} windows of {window} tokens; needs at least 1 of 2")
    if len(tokens) < window * windows:
        raise DataError(
            f"perplexity: {len(tokens)} tokens hold {len(tokens) // window} windows of {window}, "
            f"not {windows}; give a longer text or ask for fewer windows"
        )
    total = 0.0
    for index in range(windows):
        ids = [int(token) for token in tokens[index * window : (index + 1) * window]]
        total += negative_log_likelihood(logits(ids)[:-1], ids[1:])
        if progress is not None:
            mean = total / ((index + 1) * (window - 1))
            progress("perplexity", index + 1, windows, f"{_exp(mean):.3f}")
    predicted = windows * (window - 1)
    return Perplexity(_exp(total / predicted), predicted, windows)


def answer_perplexity(
    logits: Logits,
    items: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of the answers' tokens in `items` of (prompt, answer) token ids, each predicted from all before it."""
    total, predicted = 0.0, 0
    for index, (prompt, answer) in enumerate(items):
        if not prompt or not answer:
            raise DataError(f"perplexity: item {index + 1} has an empty prompt or answer")
        ids = [int(token) for token in (*prompt, *answer)]
        rows = logits(ids)[len(prompt) - 1 : -1]
        total += negative_log_likelihood(rows, ids[len(prompt) :])
        predicted += len(answer)
        if progress is not None:
            note = f"{_exp(total / predicted):.3f}"
            progress("answer perplexity", index + 1, len(items), note)
    if not predicted:
        raise DataError("perplexity: there are no items")
    return Perplexity(_exp(total / predicted), predicted, len(items))


def negative_log_likelihood(logits: NDArray[Any], targets: Sequence[int]) -> float:
    """Sum of -log softmax(logits)[target]; logits [tokens, vocabulary], accumulated in float64."""
    total = 0.0
    for start in range(0, len(targets), ROWS):
        rows = np.asarray(logits[start : start + ROWS], np.float32)
        rows = rows - rows.max(axis=1, keepdims=True)
        normalizers = np.log(np.exp(rows).sum(axis=1, dtype=np.float64))
        chosen = rows[np.arange(len(rows)), targets[start : start + ROWS]]
        total += float((normalizers - chosen).sum())
    return total


def _exp(mean: float) -> float:
    """exp, infinite where it overflows: a destroyed model is a result, not a crash."""
    return math.exp(mean) if mean < 700 else math.inf
