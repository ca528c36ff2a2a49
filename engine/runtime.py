"""The engine: a graph loaded for this machine's CPU, and what it computes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from ..progress import Progress
from . import _core
from .batch import Batch
from .generation import Completion, Generation, Prompt
from .graph import Graph, Head, Linear, Matrix
from .graph_file import read_graph
from .packing import KvType, has_calibrated_cache, pack
from .sampling import Sampling
from .state import STRIDE, State
from .tokenizer import Tokenizer


class Engine:
    """A loaded graph. Safe to use from several threads, which take turns at the CPU.

    threads: how many to compute with, the calling one included; None = the CPUs this process may
    use. pin: each of the others stays on one of these CPUs, and the first of them is left to the
    caller; for machines whose system moves threads about, and for Linux alone.
    kernels: "auto" or a row of `info()["rows"]`. cache: keys and values are kept in "f32", "f16" or
    "int8" (by the checkpoint's calibrated scales, else by the largest value of each token and
    head); "auto" takes int8 when the checkpoint was calibrated for it, else f16 when any matrix is
    quantized, else f32.
    Raises GraphError when the graph is not sound or can't run here.
    """

    def __init__(
        self,
        graph: Graph,
        threads: int | None = None,
        kernels: str = "auto",
        *,
        cache: KvType = "auto",
        pin: bool = False,
        progress: Progress | None = None,
    ) -> None:
        began = time.perf_counter()
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
            raise GraphError(f"threads is {threads!r}; give a whole number from 1 to {MAX_THREADS}")
        if cache not in get_args(KvType):
            raise GraphError(f"cache: no type {cache!r}; there are {', '.join(get_args(KvType))}")
        self.graph = graph
        self.context = graph.model.context
        self.vocabulary = graph.model.vocab_size
        self.tokenizer = Tokenizer.of(graph)
        self.end_tokens = frozenset(graph.tokenizer.eos if graph.tokenizer else ())
        self._model: _core.Model | None = pack(
            graph,
            threads=available_cpus() if threads is None else threads,
            kernels=kernels,
            cache=cache,
            pin=pin,
            progress=progress,
        )
        self._load_seconds = time.perf_counter() - began

    @classmethod
    def load(
        cls,
        path: str | Path,
        threads: int | None = None,
        kernels: str = "auto",
        *,
        cache: KvType = "auto",
        pin: bool = False,
        progress: Progress | None = None,
    ) -> Engine:
        """The engine for a folder with graph.json, or for the checkpoint folder above it."""
        began = time.perf_counter()
        engine = cls(read_graph(path), threads, kernels, cache=cache, pin=pin, progress=progress)
        engine._load_seconds = time.perf_counter() - began
        return engine

    def close(self) -> None:
        """Let the weights go; whatever is asked of the engine afterwards is a GraphError."""
        self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- computing -----------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Logits after each token, float32 [tokens, vocabulary].

        Raises GraphError for no tokens, ids outside the vocabulary, or more than the context.
        """
        ids = self.check_prompt(token_ids)
        model = self.model
        sequence = model.sequence()
        out = np.empty((len(ids), self.vocabulary), np.float32)
        for start in range(0, len(ids), STRIDE):
            part = ids[start : start + STRIDE]
            model.forward([(sequence, part, "all")], out[start : start + STRIDE])
        return out

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        after: Generation | None = None,
    ) -> Generation:
        """An iterator over the pieces of the answer's text; see `generate`.

        after: an earlier answer of this engine that is done with; what its tokens have in common
        with the prompt's beginning is not computed again.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        return Generation(self, self.tokens(prompt), max_tokens, sampling, stop, after)

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Continue `prompt` until an end token, a stop string, `max_tokens` or a full context.

        prompt: text, token ids, or chat messages (dictionaries with `role` and `content`).
        temperature 0 is greedy; else tokens are drawn with `seed` among the `top_k` likeliest
        (0 = all) and of these the likeliest that hold `top_p` of the probability. The text ends
        before the first of the `stop` strings.
        Raises GraphError when the prompt is empty or longer than the context.
        """
        generation = self.stream(prompt, max_tokens, temperature, top_k, top_p, seed, stop)
        for _ in generation:
            pass
        return generation.completion

    def state(self) -> State:
        """A new, empty sequence."""
        return State(self)

    def batch(self, max_sequences: int = 8, max_cached_tokens: int | None = None) -> Batch:
        """Answers several prompts at a time; see `Batch`."""
        return Batch(self, max_sequences, max_cached_tokens)

    # --- text ----------------------------------------------------------------------------------

    def tokens(self, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt of any kind."""
        if isinstance(prompt, str):
            return self._require_tokenizer().encode(prompt)
        parts: list[Any] = list(prompt)
        messages = [part for part in parts if isinstance(part, dict)]
        if not messages:
            return parts
        if len(messages) < len(parts):
            raise GraphError("the prompt mixes messages and token ids; give one kind")
        return self._require_tokenizer().chat(messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens; "" if the graph has no tokenizer."""
        return self.tokenizer.decode(ids) if self.tokenizer is not None else ""

    def check_prompt(self, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        """Ids as the core takes them; GraphError unless there are 1 to `context` valid ones."""
        try:
            ids = np.asarray(token_ids)
        except (ValueError, OverflowError) as error:
            raise GraphError(f"the prompt is not a row of token ids: {error}") from None
        if ids.size == 0:
            raise GraphError("the prompt is empty; give at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise GraphError(f"token ids must be one row of integers, not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise GraphError(
                f"the prompt has a token outside the vocabulary of {self.vocabulary}; "
                "was it made by another tokenizer?"
            )
        if len(ids) > self.context:
            raise GraphError(
                f"the prompt has {len(ids)} tokens, but the model's context length is "
                f"{self.context}; shorten the prompt"
            )
        return np.ascontiguousarray(ids, dtype=np.int64)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise GraphError("the graph has no tokenizer; give the prompt as token ids")
        return self.tokenizer

    # --- what it is ----------------------------------------------------------------------------

    @property
    def model(self) -> _core.Model:
        """The compiled model. Raises GraphError once the engine is closed."""
        if self._model is None:
            raise GraphError("the engine is closed; load it again")
        return self._model

    def info(self) -> dict[str, Any]:
        """How the graph runs here, JSON-ready.

        `kernels` (the row in use) and `rows` (those this CPU has); `threads`; `context` in tokens;
        `matrices`: name -> shape, dtype, activation, layout, bytes as packed, sparsity;
        `bytes_per_token`: weight bytes one decoded token reads; `cache`: type and bytes per token
        of context, and what the checkpoint was `calibrated` for ("int8" or None); `memory`: bytes
        of weights, embedding tables and buffers; `load_seconds`.
        """
        core = self.model.info()
        matrices = {
            name: self._describe(name, found) for name, found in sorted(core["matrices"].items())
        }
        reads = [op.weight for op in self.graph.ops if isinstance(op, Linear | Head)]
        kept = sum(self._matrix(name).nonzeros for name in matrices)
        weights = sum(found["rows"] * found["columns"] for found in core["matrices"].values())
        return {
            "architecture": self.graph.model.architecture,
            "kernels": core["kernels"],
            "rows": _core.rows(),
            "threads": core["threads"],
            "context": self.context,
            "matrices": matrices,
            "sparsity": 1 - kept / weights,
            "bytes_per_token": sum(matrices[name]["bytes"] for name in reads),
            "cache": {
                "type": core["kv"],
                "bytes_per_token": core["page_bytes"] // core["page_tokens"],
                "calibrated": "int8" if has_calibrated_cache(self.graph) else None,
            },
            "memory": {
                "weights": sum(found["bytes"] for found in matrices.values()),
                "tables": core["table_bytes"],
                "buffers": core["buffer_bytes"],
            },
            "load_seconds": self._load_seconds,
        }

    def _matrix(self, name: str) -> Matrix:
        matrix = self.graph.tensors[name]
        assert isinstance(matrix, Matrix)
        return matrix

    def _describe(self, name: str, packed: dict[str, Any]) -> dict[str, Any]:
        matrix = self._matrix(name)
        activation = matrix.activation
        kind = None if activation is None else "float" if activation.bits == 16 else "int8"
        return {
            "shape": [packed["rows"], packed["columns"]],
            "dtype": matrix.dtype,
            "group": matrix.group,
            "activation": kind,
            "layout": packed["layout"],
            "bytes": packed["bytes"],
            "sparsity": 1 - matrix.nonzeros / (packed["rows"] * packed["columns"]),
        }


MAX_THREADS = 1024  # of the core's pool


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
