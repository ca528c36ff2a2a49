"""The next token from logits: greedy, or drawn at a temperature among the likeliest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError, ParingError

HEAD = 512  # greatest weights that are tried for a nucleus before all


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    The filters apply in the order temperature, top_k, top_p, as in transformers; the same seed
    draws the same tokens from the same logits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ParingError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ParingError(f"top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ParingError(f"top_p is {self.top_p}; give more than 0, up to 1 (all tokens)")
        if self.seed < 0:
            raise ParingError(f"seed is {self.seed}; give 0 or more")


class Sampler:
    """Draws tokens one after the other, with the random state of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def next(self, logits: NDArray[Any]) -> int:
        """A token id for logits [vocabulary]. Raises GraphError if they are not finite."""
        best = int(np.argmax(logits))  # a NaN counts as the greatest
        if not math.isfinite(float(logits[best])):
            raise GraphError("the model's logits are not finite; its weights overflow")
        if np.float32(self.sampling.temperature) == 0:
            return best
        tokens, weights = self.candidates(logits)
        cumulative = np.cumsum(weights)
        drawn = self._random.random() * cumulative[-1]
        place = int(np.searchsorted(cumulative, drawn, side="right"))
        return int(tokens[min(place, len(tokens) - 1)])

    def candidates(self, logits: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Ids that may be drawn, and their weights (not normalized), both [n]."""
        top_k, top_p = self.sampling.top_k, self.sampling.top_p
        tokens = np.arange(len(logits))
        if 0 < top_k < len(logits):
            tokens = np.sort(np.argpartition(logits, -top_k)[-top_k:])
            logits = logits[tokens]
        # float32 is fast and as fine as the logits; sums are taken in float64.
        with np.errstate(over="ignore"):  # minus infinity is right far below the greatest
            scaled = (logits - logits.max()) / np.float32(self.sampling.temperature)
        weights = np.exp(scaled).astype(np.float64)
        if top_p < 1:
            kept = nucleus(weights, top_p)
            tokens, weights = tokens[kept], weights[kept]
        return tokens, weights


def nucleus(weights: NDArray[Any], top_p: float) -> NDArray[Any]:
    """Places of the fewest greatest weights [n] that hold `top_p` of their sum, greatest first.

    Of equal weights the earlier comes first. Nearly always a few hundred are enough, so these are
    tried before all n are sorted.
    """
    enough = top_p * weights.sum()
    for most in (HEAD, len(weights)):
        if most < len(weights):
            places = np.flatnonzero(weights > np.partition(weights, -most)[-most])
        else:
            places = np.arange(len(weights))
        order = places[np.argsort(-weights[places], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        kept: NDArray[Any] = order[before < enough]
        if len(kept) < len(order) or len(order) == len(weights):
            break
    return kept
