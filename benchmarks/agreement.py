"""Does the engine compute what torch computes? Top-1 agreement and perplexity on one text.

    python benchmarks/agreement.py CHECKPOINT --data FILE [--tokens 2000] [--windows 40] [--control]

CHECKPOINT is a Hugging Face folder with its graph in `graph/` (or give --graph). Prints one JSON object; exits 1 when
agreement is below 99 % or the perplexities differ by more than 0.5 %.

Where activations are rounded to int8, a last bit of a float sum decides now and then which integer is taken, and all
that follows moves. `--control` shows how much of a difference that alone makes: torch in float64 against torch in
float32, by the same formulas on the same tokens. An engine can't be asked to agree better than that.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from paring.engine import Engine
from paring.engine.perplexity import Logits, negative_log_likelihood

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
    parser.add_argument("--cache", choices=("auto", "f32", "f16", "int8"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--control", action="store_true", help="torch in float64 as well")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = Engine.load(
        options.graph or options.checkpoint, options.threads, options.kernels, cache=options.cache
    )
    windows = read_windows(engine, options.data, max(options.windows, -(-options.tokens // WINDOW)))
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    ours, theirs = Pass(engine.logits, options.tokens), Pass(run(model), options.tokens)
    for window in windows:
        ours.take(window)
        theirs.take(window)
    result: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "kernels": engine.info()["kernels"],
        "cache": engine.info()["cache"]["type"],
        "windows": len(windows),
        **compare(ours, theirs),
    }
    result["passed"] = (
        result["top1_agreement"] >= LEAST_AGREEMENT
        and abs(result["perplexity_difference"]) <= LARGEST_DIFFERENCE
    )
    if options.control:
        control = Pass(run(model.double()), options.tokens)
        for window in windows[: len(theirs.chosen)]:
            control.take(window)
        result["control"] = compare(control, theirs)
    print(json.dumps(result, indent=2))
    return 0 if result["passed"] else 1


def read_windows(engine: Engine, data: Path, count: int) -> list[list[int]]:
    """The first `count` windows of the text, as the perplexity protocol cuts them."""
    assert engine.tokenizer is not None
    tokens = engine.tokenizer.encode(data.read_text(encoding="utf-8"), special=False)
    if len(tokens) < count * WINDOW:
        sys.exit(f"{data}: too short for {count} windows of {WINDOW} tokens")
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def run(model: Any) -> Logits:
    # Not inference_mode: a compressed model unpacks itself in its first call, and is then made float64.
    @torch.no_grad()
    def logits(ids: list[int]) -> np.ndarray[Any, Any]:
        found = model(torch.tensor([ids]), use_cache=False).logits[0]
        return np.asarray(found.float().numpy())

    return logits


@dataclass
class Pass:
    """One model over the windows: the sum of each window's losses, and the first tokens' choices and logits."""

    logits: Logits
    tokens: int  # whose choices are kept
    losses: list[float] = field(default_factory=list)
    chosen: list[np.ndarray[Any, Any]] = field(default_factory=list)
    kept: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def take(self, window: list[int]) -> None:
        found = self.logits(window)
        self.losses.append(negative_log_likelihood(found[:-1], window[1:]))
        if left := max(self.tokens - sum(map(len, self.chosen)), 0):
            self.chosen.append(found[:left].argmax(1))
            self.kept.append(found[:left])


def compare(a: Pass, b: Pass) -> dict[str, Any]:
    """`a` against `b` over the windows that both took.

    `perplexity_error` is the standard error of the relative difference, from its spread over windows.
    """
    shared = min(len(a.losses), len(b.losses))
    losses = np.array([a.losses[:shared], b.losses[:shared]]) / (WINDOW - 1)
    mean, differences = losses.mean(axis=1), losses[0] - losses[1]
    same = np.concatenate(a.chosen) == np.concatenate(b.chosen)
    pairs = list(zip(a.kept, b.kept, strict=True))
    distance = np.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in pairs))
    return {
        "compared_tokens": len(same),
        "top1_agreement": float(same.mean()),
        "relative_logit_distance": float(
            distance / np.sqrt(sum(float((y**2).sum()) for _, y in pairs))
        ),
        "perplexity": float(np.exp(mean[0])),
        "torch_perplexity": float(np.exp(mean[1])),
        "perplexity_difference": float(np.expm1(mean[0] - mean[1])),
        "perplexity_error": float(differences.std(ddof=1) / np.sqrt(shared))
        if shared > 1
        else None,
    }


if __name__ == "__main__":
    sys.exit(main())
