"""Does the engine compute what torch computes? Top-1 agreement and perplexity on one text.

    python benchmarks/agreement.py CHECKPOINT --data FILE [--tokens 2000] [--windows 40]

CHECKPOINT is a Hugging Face folder with its graph in `graph/` (or give --graph). Prints one JSON object; exits 1 when
agreement is below 99 % or the perplexities differ by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from paring.engine import Engine
from paring.engine.perplexity import perplexity

WINDOW = 512
LEAST_AGREEMENT, LARGEST_DIFFERENCE = 0.99, 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--graph", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=2000, help="predictions to compare")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 for perplexity")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    result = compare(options)
    print(json.dumps(result, indent=2))
    return 0 if result["passed"] else 1


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both models over the same windows, once."""
    graph = options.graph or options.checkpoint
    engine = Engine.load(graph, threads=options.threads, kernels=options.kernels)
    assert engine.graph.folder is not None
    assert engine.graph.tokenizer is not None
    tokenizer = tokenizers.Tokenizer.from_file(
        str(engine.graph.folder / engine.graph.tokenizer.file)
    )
    tokenizer.no_truncation()
    text = options.data.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    agreement = Agreement(engine, model, options.tokens)
    ours = perplexity(agreement.engine_logits, tokens, WINDOW, options.windows)
    theirs = perplexity(agreement.torch_logits, tokens, WINDOW, options.windows)
    difference = ours.value / theirs.value - 1
    share = agreement.same / agreement.seen
    return {
        "checkpoint": str(options.checkpoint),
        "kernels": engine.info()["kernels"],
        "compared_tokens": agreement.seen,
        "top1_agreement": share,
        "largest_logit_difference": agreement.largest,
        "engine_perplexity": ours.value,
        "torch_perplexity": theirs.value,
        "perplexity_difference": difference,
        "windows": options.windows,
        "passed": share >= LEAST_AGREEMENT and abs(difference) <= LARGEST_DIFFERENCE,
    }


class Agreement:
    """Keeps what the engine said about the first windows, and counts where torch says the same."""

    def __init__(self, engine: Engine, model: Any, tokens: int) -> None:
        self.engine, self.model, self.tokens = engine, model, tokens
        self.kept: list[np.ndarray] = []
        self.seen = self.same = 0
        self.largest = 0.0

    def engine_logits(self, ids: list[int]) -> np.ndarray:
        found = self.engine.logits(ids)
        if sum(len(rows) for rows in self.kept) < self.tokens:
            self.kept.append(found)
        return found

    @torch.inference_mode()
    def torch_logits(self, ids: list[int]) -> np.ndarray:
        found: np.ndarray = self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        if self.kept:
            ours = self.kept.pop(0)[: self.tokens - self.seen]
            theirs = found[: len(ours)]
            self.seen += len(ours)
            self.same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            self.largest = max(self.largest, float(np.abs(ours - theirs).max()))
        return found


if __name__ == "__main__":
    sys.exit(main())
