"""One sequence of an engine, and several of them computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    from .runtime import Engine

# Tokens per call of the core: between calls Python sees Ctrl-C.
STRIDE = 512


class State:
    """One sequence: its tokens so far are in the cache, `logits` [vocabulary] are for the next (NaN: unknown)."""

    def __init__(self, engine: Engine, sequence: _core.Sequence | None = None) -> None:
        self._engine = engine
        self._sequence = engine.model.sequence() if sequence is None else sequence
        self._tokens: list[int] = []
        self._token = np.empty(1, np.int64)
        self._logits = np.full((1, engine.vocabulary), np.nan, np.float32)
        self.logits: NDArray[np.float32] = self._logits[0]

    @property
    def length(self) -> int:
        return self._sequence.length

    def append(self, token: int) -> None:
        """Compute one more token."""
        self._token[0] = token
        advance([(self, self._token, True)], self._logits)

    def extend(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Compute several tokens, int64 [n]: all, or none where it raises; the logits are those after the last."""
        tokens, before = np.ascontiguousarray(tokens, np.int64), self.length
        try:
            for start in range(0, len(tokens), STRIDE):
                last = start + STRIDE >= len(tokens)
                advance([(self, tokens[start : start + STRIDE], last)], self._logits)
        except BaseException:
            self.truncate(before)
            raise

    def common(self, prompt: NDArray[np.int64]) -> int:
        """How many of these tokens `prompt` begins with, its last one never counted."""
        known = np.array(self._tokens[: min(len(prompt) - 1, self.length)], np.int64)
        differing = np.flatnonzero(known != prompt[: len(known)])
        return int(differing[0]) if len(differing) else len(known)

    def rewind(self, prompt: NDArray[np.int64]) -> int:
        """Forget what `prompt` doesn't begin with, and its last token; returns what is kept."""
        kept = self.common(prompt)
        self.truncate(kept)
        return kept

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if length < self.length:
            self._logits.fill(np.nan)  # they came after another
        self._sequence.truncate(length)
        del self._tokens[length:]

    def fork(self, length: int) -> State:
        """A sequence of its own that begins with the first `length` tokens of this one.

        Full pages of the cache are shared, until either of the two writes into them.
        """
        made = State(self._engine, self._sequence.fork(length))
        made._tokens = self._tokens[:length]
        return made


def advance(
    parts: Sequence[tuple[State, NDArray[np.int64], bool]], logits: NDArray[np.float32]
) -> None:
    """Compute the next tokens of several sequences of one engine, reading its weights once.

    parts: a sequence, its next tokens int64 [n], whether the logits after the last one are wanted:
    these go to `logits` float32 [at least as many, vocabulary], one row after the other. Every
    sequence gets what it would get alone. Raises GraphError, with all sequences as they were, when
    tokens are missing or unknown, one sequence is there twice or would outgrow the context.
    """
    calls: list[Any] = [
        (state._sequence, tokens, "last" if wanted else "none") for state, tokens, wanted in parts
    ]
    rows = sum(wanted for _, _, wanted in parts)
    model = parts[0][0]._engine.model
    before = [state.length for state, _, _ in parts]
    try:
        model.forward(calls, logits[:rows] if rows else None)
        for state, tokens, _ in parts:
            state._tokens.extend(tokens.tolist())
    except BaseException:  # Ctrl-C, which Python raises once `forward` is back, is one too
        for (state, _, _), length in zip(parts, before, strict=True):
            state.truncate(length)
        raise


def advance_greedily(states: Sequence[State], tokens: int) -> None:
    """Append so many tokens, each the likeliest, to every one of several sequences; raises as `advance` does."""
    logits = np.stack([state.logits for state in states])
    for _ in range(tokens):
        chosen = logits.argmax(axis=1)
        advance([(state, chosen[i : i + 1], True) for i, state in enumerate(states)], logits)
