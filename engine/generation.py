"""One answer of the engine, piece by piece: prefill, decode, stop, detokenize, timings."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..errors import GraphError
from .answer import Answer, FinishReason
from .sampling import Sampling
from .tokenizer import Message

if TYPE_CHECKING:
    from .runtime import Engine
    from .state import State

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"


@dataclass(frozen=True)
class Timings:
    """Tokens and wall seconds of the prompt and of the answer (from the prompt's end on).

    `prompt_tokens` are those that were computed, without what an earlier answer had left.
    """

    prompt_tokens: int
    prompt_seconds: float
    tokens: int
    seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: the first token came with the prompt, so it does not count."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished answer. `tokens` holds every id that was chosen, an end token included."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    timings: Timings


class Generation(Iterator[str]):
    """An answer in the making: iterate for its text; then `completion` tells how it went.

    Pieces never end in half a character or half a stop string, and their sum is the text.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        after: Generation | None = None,
    ) -> None:
        if after is not None and after._engine is not engine:
            raise GraphError("the earlier answer is another engine's")
        self._engine: Engine = engine
        self._prompt = engine.check_prompt(prompt)
        self._answer = Answer(engine, max_tokens, sampling, stop)
        self._after = after
        self._state: State | None = None
        self._computed = 0
        self._prompt_seconds = self._seconds = 0.0
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop here; `completion` is then not available."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._answer.text

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises GraphError before the last piece has been taken."""
        answer = self._answer
        if answer.finish_reason is None:
            raise GraphError("the answer is not finished; take all of its pieces first")
        timings = Timings(self._computed, self._prompt_seconds, len(answer.tokens), self._seconds)
        return Completion(answer.text, answer.tokens, answer.finish_reason, timings)

    def _run(self) -> Generator[str, None, None]:
        answer = self._answer
        began = time.perf_counter()
        state = self._begin()
        self._prompt_seconds = time.perf_counter() - began
        began = time.perf_counter()
        while True:
            piece = answer.choose(state.logits, room=state.length < self._engine.context)
            self._seconds = time.perf_counter() - began
            if piece:
                yield piece
            if answer.finish_reason is not None:
                return
            state.append(answer.tokens[-1])

    def _begin(self) -> State:
        """The prompt computed, on top of what the earlier answer has in common with it."""
        earlier, self._after = self._after, None
        state = earlier.release() if earlier is not None else None
        if state is None:
            state = self._engine.state()
        self._computed = len(self._prompt) - state.rewind(self._prompt)
        state.extend(self._prompt[len(self._prompt) - self._computed :])
        self._state = state
        return state

    def release(self) -> State | None:
        """Hand the sequence over to a following answer; this one must not go on."""
        self.close()
        state, self._state = self._state, None
        return state
