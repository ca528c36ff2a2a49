"""Several answers at a time: one pass over the weights gives every sequence its next token."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError, ParingError
from .answer import Answer
from .generation import Completion, Prompt, Timings
from .sampling import Sampling
from .state import State, advance

if TYPE_CHECKING:
    from .runtime import Engine

STEP_TOKENS = 128  # as many as the core takes in one pass: prompts share what decoding leaves


class Request:
    """A prompt that was submitted to a batch: it waits, runs, and is `done`."""

    def __init__(self, engine: Engine, prompt: NDArray[np.int64], answer: Answer) -> None:
        self.prompt = prompt
        self.answer = answer
        self.error: ParingError | None = None
        self.reused = 0  # tokens of the prompt that another sequence had computed
        self._context = engine.context
        self._cancelled = False
        self._state: State | None = None
        self._began = self._first = self._last = 0.0

    @property
    def done(self) -> bool:
        """Whether nothing more will come: finished, failed or cancelled."""
        return self.answer.finish_reason is not None or self.error is not None

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.answer.text

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises GraphError if it is not finished, or the error that ended it."""
        if self.error is not None:
            raise self.error
        if self.answer.finish_reason is None:
            raise GraphError("the answer is not finished; step the batch until it is")
        return Completion(
            self.text,
            self.answer.tokens,
            self.answer.finish_reason,
            Timings(
                len(self.prompt) - self.reused,
                self._first - self._began,
                len(self.answer.tokens),
                self._last - self._first,
            ),
        )

    def cancel(self) -> None:
        """Let the next step drop it; from any thread. Nothing happens if it is done."""
        self._cancelled = True

    @property
    def _most_tokens(self) -> int:
        """The cache it may come to need; the last token of an answer is never computed."""
        return min(len(self.prompt) + self.answer.max_tokens - 1, self._context)

    def _next(self, budget: int) -> NDArray[np.int64]:
        """The tokens to compute in this step: of the prompt at most `budget`, or the last chosen."""
        assert self._state is not None
        computed = len(self.prompt) + max(len(self.answer.tokens), 1) - 1
        if self._state.length > computed:  # Ctrl-C came before its logits were looked at
            self._state.truncate(computed)
        if self.answer.tokens:
            return np.array(self.answer.tokens[-1:], np.int64)
        return self.prompt[self._state.length :][:budget]

    def _take(self, logits: NDArray[np.float32]) -> str:
        """Choose a token; an error of its own ends this answer and no other."""
        assert self._state is not None
        self._last = time.perf_counter()
        if not self.answer.tokens:
            self._first = self._last
        try:
            return self.answer.choose(logits, room=self._state.length < self._context)
        except ParingError as error:
            self.error = error
            return ""


@dataclass(frozen=True)
class Event:
    """News of a request: text that its answer goes on with, and whether it is done."""

    request: Request
    text: str
    done: bool


class Batch:
    """Requests that are computed together; they join and leave between two tokens.

    Every answer is exactly what `Engine.generate` gives for the same prompt and settings. A prompt
    that begins like a sequence that is running, or that ran lately, starts from what that one has
    computed. Requests start in the order they were submitted.

    max_sequences: how many run at a time, and how many that ran are kept for their beginnings.
    max_cached_tokens: most tokens in all caches; a request starts once the most it may come to need
    is free, so that none runs out on the way. None = all `max_sequences` may fill the context.
    One thread steps, any thread may submit, cancel and wait.
    """

    def __init__(
        self, engine: Engine, max_sequences: int = 8, max_cached_tokens: int | None = None
    ) -> None:
        if max_sequences < 1:
            raise ParingError(f"max_sequences is {max_sequences}; give at least 1")
        self._engine = engine
        self._page = int(engine.model.info()["page_tokens"])
        most = max_sequences * self._pages(engine.context)
        self.max_sequences = max_sequences
        self.max_cached_tokens = most if max_cached_tokens is None else max_cached_tokens
        self._queue = threading.Condition()
        self._waiting: deque[Request] = deque()  # under _queue
        self._stepping = threading.Lock()
        self._running: list[Request] = []  # under _stepping, like all that follows
        self._kept: list[State] = []  # least recently used first
        self._events: list[Event] = []  # not yet returned
        self._logits = np.empty((max_sequences, engine.vocabulary), np.float32)

    def submit(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Request:
        """Queue a prompt; the arguments are those of `Engine.generate`.

        Raises GraphError when the prompt is empty, too long, or may need more than
        `max_cached_tokens`.
        """
        answer = Answer(self._engine, max_tokens, Sampling(temperature, top_k, top_p, seed), stop)
        ids = self._engine.check_prompt(self._engine.tokens(prompt))
        request = Request(self._engine, ids, answer)
        needed = self._pages(request._most_tokens)
        if needed > self.max_cached_tokens:
            raise GraphError(
                f"prompt and answer may take {needed} tokens of cache, in pages of {self._page}, but "
                f"max_cached_tokens is {self.max_cached_tokens}; ask for fewer, or raise it"
            )
        with self._queue:
            self._waiting.append(request)
            self._queue.notify_all()
        return request

    @property
    def busy(self) -> bool:
        """Whether requests run or wait, or events that an interrupt held back do."""
        return bool(self._running or self._waiting or self._events)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to step, for `timeout` seconds at most; returns `busy`."""
        with self._queue:
            return self._queue.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Event]:
        """One pass over the weights: a token for every answer, and parts of new prompts.

        Returns what came of it, at once and with nothing if there is nothing to do. When the
        engine fails (GraphError: it is closed), all requests are as they were.
        """
        with self._stepping:
            self._finish()  # what was done when Ctrl-C ended the last step
            self._drop_cancelled()
            self._admit()
            if self._running:
                self._compute()
            events, self._events = self._events, []
            return events

    def __iter__(self) -> Iterator[Event]:
        """Events of one step after the other, until no request is left."""
        while self.busy:
            yield from self.step()

    # --- a step --------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        with self._queue:
            dropped = [r for r in (*self._waiting, *self._running) if r._cancelled]
            self._waiting = deque(r for r in self._waiting if not r._cancelled)
        for request in dropped:
            request.error = GraphError("the request was cancelled")
            self._events.append(Event(request, "", True))
        self._retire(dropped)

    def _admit(self) -> None:
        """Start waiting requests, first come first served, while there is room for the next."""
        while len(self._running) < self.max_sequences:
            with self._queue:
                request = self._waiting[0] if self._waiting else None
            if request is None:
                return
            needed = self._promised() + self._pages(request._most_tokens)
            if needed > self.max_cached_tokens:
                return
            request._state = self._begin(request)
            request._began = time.perf_counter()
            self._running.append(request)
            with self._queue:  # only the thread that steps takes any away
                self._waiting.popleft()
            self._forget()

    def _promised(self) -> int:
        """Tokens of cache that the running may come to need."""
        return sum(self._pages(request._most_tokens) for request in self._running)

    def _begin(self, request: Request) -> State:
        """A sequence that has as much of the prompt as any that is at hand."""
        states = [*self._kept, *(r._state for r in self._running if r._state is not None)]
        best = max(states, key=lambda state: state.common(request.prompt), default=None)
        request.reused = best.common(request.prompt) if best is not None else 0
        if best is None or request.reused == 0:
            return self._engine.state()
        made = best.fork(request.reused)
        if best in self._kept:
            self._kept.remove(best)
            if request.reused < best.length:  # else the new one has all of it
                self._kept.append(best)
        return made

    def _forget(self) -> None:
        """Drop kept sequences, least recently used first, until they are few and have room."""
        room = self.max_cached_tokens - self._promised()
        while self._kept and (
            len(self._kept) > self.max_sequences
            or sum(self._pages(state.length) for state in self._kept) > room
        ):
            del self._kept[0]

    def _compute(self) -> None:
        decoding = sum(bool(request.answer.tokens) for request in self._running)
        budget = max(STEP_TOKENS - decoding, 1)
        parts: list[tuple[State, NDArray[np.int64], bool]] = []
        takers = []
        for request in self._running:
            tokens = request._next(budget)
            if len(tokens) == 0:
                continue  # the others' prompts took all
            assert request._state is not None
            if not request.answer.tokens:
                budget -= len(tokens)
            complete = request._state.length + len(tokens) >= len(request.prompt)
            parts.append((request._state, tokens, complete))
            if complete:
                takers.append(request)
        if not parts:
            return
        advance(parts, self._logits)
        for request, logits in zip(takers, self._logits, strict=False):
            text = request._take(logits)
            if text:
                self._events.append(Event(request, text, request.done))
        self._finish()

    def _finish(self) -> None:
        """Retire what is done; the last event of each tells so."""
        finished = [request for request in self._running if request.done]
        told = {id(event.request) for event in self._events if event.done}
        self._events += [
            Event(request, "", True) for request in finished if id(request) not in told
        ]
        self._retire(finished)

    def _retire(self, requests: list[Request]) -> None:
        """Their sequences are kept for what begins alike, as far as there is room."""
        for request in requests:
            if request in self._running:  # else it was cancelled while it waited
                self._running.remove(request)
            state, request._state = request._state, None
            if state is not None and state.length:
                self._kept.append(state)
        self._forget()

    def _pages(self, tokens: int) -> int:
        """Tokens that their pages have room for."""
        return -(-tokens // self._page) * self._page
