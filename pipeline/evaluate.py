"""What a model is worth: perplexity and decode speed, by torch before the recipe and by the engine after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engine import Engine
from ..engine.benchmark import benchmark
from ..engine.export import export
from ..engine.perplexity import answer_perplexity, perplexity
from ..errors import DataError
from ..progress import Progress
from .data import evaluation_tokens, prompts_with_answers
from .greedy import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipes import DataConfig

PROMPT, DECODED, ROUNDS = 64, 64, 3  # tokens before, tokens timed, and how often
WINDOWS = 40  # of the perplexity protocol, when the recipe gives no number


@dataclass(frozen=True)
class Exam:
    """What perplexity is measured on: equally long windows of text, or answers to prompts."""

    dataset: str
    split: str
    windows: list[list[int]]
    items: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Exam:
        """The first `windows` windows of `length` tokens, or the first `samples` rows where there are answers.

        Raises DataError when there are fewer than asked for.
        """
        if config.has_answers:
            items = prompts_with_answers(config, tokenizer)
            return cls(config.dataset, config.split, [], items)
        tokens, length = evaluation_tokens(config, tokenizer), config.length
        available = len(tokens) // length
        wanted = config.windows or min(WINDOWS, max(available, 1))
        if available < wanted:
            raise DataError(
                f"{config.dataset} (split {config.split}): the recipe evaluates {wanted} windows of "
                f"{length} tokens, but the text has only {available}; lower `windows` or `length`"
            )
        windows = [tokens[i * length : (i + 1) * length] for i in range(wanted)]
        return cls(config.dataset, config.split, windows, [])

    def describe(self) -> dict[str, Any]:
        if self.items:
            return {"dataset": self.dataset, "split": self.split, "answers": len(self.items)}
        size = {"windows": len(self.windows), "length": len(self.windows[0])}
        return {"dataset": self.dataset, "split": self.split, **size}

    def excerpts(self) -> list[list[int]]:
        """The texts it measures on, as tokens."""
        return self.windows or [[*prompt, *answer] for prompt, answer in self.items]

    def prompts(self, length: int) -> list[list[int]]:
        """Beginnings to continue: the prompts of answers, or the first `length` tokens of windows from all over."""
        if self.items:
            return [prompt for prompt, _ in self.items if prompt]
        every = max(1, len(self.windows) // 3)
        return [window[:length] for window in self.windows[::every]]

    def torch(self, model: PreTrainedModel, progress: Progress | None = None) -> float:
        """Perplexity of a torch model."""

        @torch.inference_mode()
        def logits(ids: list[int]) -> np.ndarray[Any, Any]:
            batch = torch.tensor([ids], device=model.device)
            found: np.ndarray[Any, Any] = (
                model(batch, use_cache=False).logits[0].float().cpu().numpy()
            )
            return found

        model.eval()
        return self._perplexity(logits, progress)

    def engine(self, graph: Path, progress: Progress | None = None) -> float:
        """Perplexity of an exported graph, run by the engine."""
        return self._perplexity(Engine.load(graph).logits, progress)

    def _perplexity(
        self, logits: Callable[[list[int]], np.ndarray[Any, Any]], progress: Progress | None
    ) -> float:
        if self.items:
            return answer_perplexity(logits, self.items, progress).value
        tokens = [token for window in self.windows for token in window]
        length = len(self.windows[0])
        return perplexity(logits, tokens, length, len(self.windows), progress).value


def compare_speed(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    graph: Path,
    work: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode tokens/s of the pared `graph`, of the dense float32 `base` in the engine, and of `base` in torch.

    One sequence, greedy, after a short prompt, on as many threads as torch uses; medians of a few rounds, in which the
    two graphs take turns, and torch's best round, for its threads suffer most from other work on the machine.
    `load` is the machine's, per CPU: well above 1, others were at work. `work` is an empty folder for the dense graph.
    """
    base.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    dense = export(work / "base", work / "dense")
    threads = torch.get_num_threads()
    context = base.config.max_position_embeddings
    prompt, tokens = min(PROMPT, context // 2), min(DECODED, context // 2)
    by_torch = max(_torch_speed(base, prompt, tokens) for _ in range(ROUNDS))
    found = benchmark(
        graph,
        dense,
        prompt=prompt,
        tokens=tokens,
        threads=threads,
        rounds=ROUNDS,
        progress=progress,
    )
    assert found.baseline is not None
    return {
        "torch": by_torch,
        "dense": found.baseline.decode_median,
        "pared": found.speed.decode_median,
        "kernels": found.speed.kernels,
        "machine": found.machine,
        "load": os.getloadavg()[0] / (os.cpu_count() or 1),
        "threads": threads,
        "prompt": prompt,
        "tokens": tokens,
    }


@torch.inference_mode()
def _torch_speed(model: PreTrainedModel, prompt: int, tokens: int) -> float:
    decoded = greedy(model, list(range(prompt)))
    next(decoded)  # the prompt
    began = time.perf_counter()
    for _ in range(tokens):
        next(decoded)
    return tokens / (time.perf_counter() - began)
