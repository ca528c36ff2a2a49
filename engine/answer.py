"""What is chosen for one prompt, token by token: sampling, text, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from numpy.typing import NDArray

from ..errors import ParingError
from .detokenize import Detokenizer, StopStrings
from .sampling import Sampler, Sampling

if TYPE_CHECKING:
    from .runtime import Engine

# "stop": an end token or stop string; "length": max_tokens; "context": the context is full.
FinishReason: TypeAlias = Literal["stop", "length", "context"]


class Answer:
    """The tokens so far, the text they give, and why it ended once `finish_reason` is set.

    Raises ParingError for settings that mean nothing.
    """

    def __init__(
        self, engine: Engine, max_tokens: int, sampling: Sampling, stop: str | Sequence[str]
    ) -> None:
        if max_tokens < 1:
            raise ParingError(f"max_tokens is {max_tokens}; give at least 1")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ParingError("a stop string is empty; every text has one at its start")
        self.max_tokens = max_tokens
        self.tokens: list[int] = []  # an end token included
        self.finish_reason: FinishReason | None = None
        self._end_tokens = engine.end_tokens
        self._sampler = Sampler(sampling)
        self._detokenizer = Detokenizer(engine.decode)
        self._stops = StopStrings(stops)
        self._text: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._text)

    def choose(self, logits: NDArray[Any], room: bool) -> str:
        """Take one more token by its logits [vocabulary]; returns the text that it completes.

        room: whether the context has a place for it. Raises GraphError for logits that are not
        finite.
        """
        token = self._sampler.next(logits)
        self.tokens.append(token)
        if token in self._end_tokens:
            return self._end("stop", "")
        piece = self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            return self._finish("stop", piece)
        if len(self.tokens) >= self.max_tokens:
            return self._end("length", piece)
        if not room:
            return self._end("context", piece)
        self._text.append(piece)
        return piece

    def _end(self, reason: FinishReason, piece: str) -> str:
        """Text held back comes out; it may still complete a stop string."""
        piece += self._stops.push(self._detokenizer.flush())
        found = self._stops.found
        return self._finish("stop" if found else reason, piece + self._stops.flush())

    def _finish(self, reason: FinishReason, piece: str) -> str:
        self._text.append(piece)
        self.finish_reason = reason  # last: another thread that sees it reads the text
        return piece
