"""The model before and after, side by side: what each block puts out, what goes into each layer, what is said."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine import Engine
from .greedy import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXCERPTS, LENGTH = 2, 512  # what the blocks are compared on
SAMPLES, PROMPT, SAID = 3, 24, 40  # texts to continue, their tokens, and tokens said


def compare(
    base: PreTrainedModel, pared: PreTrainedModel, excerpts: list[list[int]]
) -> dict[str, Any]:
    """On a few tokens: relative error of each block's output, and each Linear's input range, before and after.

    `block_errors[i]` is |after - before|^2 / |before|^2 over all tokens; ranges are max - min, by layer.
    """
    tokens = [torch.tensor([ids[:LENGTH]]) for ids in excerpts[:EXCERPTS]]
    ranges: list[dict[str, float]] = []
    states = []
    for model in (base, pared):
        model.eval()
        with torch.inference_mode(), _input_ranges(model) as found:
            outputs = [
                model(ids.to(model.device), use_cache=False, output_hidden_states=True)
                for ids in tokens
            ]
        states.append([[h.float().cpu() for h in o.hidden_states[1:]] for o in outputs])
        ranges.append(found)
    errors = []
    for index in range(len(states[0][0])):
        pairs = [(b[index], a[index]) for b, a in zip(*states, strict=True)]
        error = sum(float((a - b).square().sum()) for b, a in pairs)
        errors.append(error / max(sum(float(b.square().sum()) for b, _ in pairs), 1e-30))
    both = {name: [ranges[0][name], after] for name, after in ranges[1].items()}
    return {"block_errors": errors, "input_ranges": both}


@contextmanager
def _input_ranges(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """The range (max - min) of every Linear's input so far, by name; the logits matrix is left out."""
    extremes: dict[str, tuple[float, float]] = {}
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = extremes.get(name, (torch.inf, -torch.inf))
            x = inputs[0]
            extremes[name] = low, high = min(low, float(x.min())), max(high, float(x.max()))
            found[name] = high - low

        return look

    head = model.get_output_embeddings()
    handles = [
        module.register_forward_pre_hook(watch(name), prepend=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def text_samples(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    graph: Path,
    prompts: list[list[int]],
) -> list[dict[str, str]]:
    """What `base` (in torch) and the graph (in the engine) say next, both greedily: prompt, before, after."""
    engine = Engine.load(graph)
    found = []
    for ids in prompts[:SAMPLES]:
        before = _continue(base, ids)
        after = engine.generate(ids, max_tokens=SAID).tokens
        texts = (str(tokenizer.decode(part)) for part in (ids, before, after))
        found.append(dict(zip(("prompt", "before", "after"), texts, strict=True)))
    engine.close()
    return found


@torch.inference_mode()
def _continue(model: PreTrainedModel, ids: list[int]) -> list[int]:
    stops = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(stops if isinstance(stops, list) else [stops])
    said = itertools.takewhile(lambda token: token not in ends, greedy(model, ids))
    return list(itertools.islice(said, SAID))
