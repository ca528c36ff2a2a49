"""Paring's engine under the same protocol; `protocol.py` says what is asked of this script.

A variant is PATTERN@SPARSITY/DTYPE, as in `1x4@0.7/int4`, or `fp32`; with another `/int4` the head is int4 too, else it
is int8; with `+int8` after it, keys and values are kept in int8; with `*8` at the end, eight sequences are decoded
together, and the speed is that of all. The graphs are pruned by magnitude and rounded, for their speed alone: int8 per
row or int4 in groups of 64, with int8 inputs, those of the head in float.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from protocol import Stepwise, made_once, main

from paring.engine import Engine
from paring.engine.state import advance_greedily


def graph_folder(options: argparse.Namespace) -> Path:
    name = parts(options.variant)[0]
    return Path(options.work) / f"paring-{name.replace('/', '-').replace(':', 'of')}"


def parts(variant: str) -> tuple[str, str, int]:
    """What the graph is, how keys and values are kept, and how many sequences are decoded at once."""
    system, _, sequences = variant.partition("*")
    name, _, cache = system.partition("+")
    return name, cache or "auto", int(sequences or 1)


def prepare(options: argparse.Namespace) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from pattern_graphs import dense_graph, write_pruned

    from paring.engine.export import export

    folder = graph_folder(options)
    with made_once(folder) as part:
        if part is None:
            return
        name = parts(options.variant)[0]
        if name == "fp32":
            export(options.model, part)
            return
        structure, dtype, *head = name.split("/")
        pattern, _, sparsity = structure.partition("@")
        dense = dense_graph(str(options.model), Path(options.work) / "paring-int8-head")
        write_pruned(dense, pattern, float(sparsity), dtype, part, *head)


class Paring(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        import paring

        _, cache, self.sequences = parts(options.variant)
        self.engine = Engine.load(graph_folder(options), threads=options.threads, cache=cache)
        info = self.engine.info()
        self.version = f"{paring.__version__}, row {info['kernels']}"
        self.bytes_per_token = info["bytes_per_token"]
        self.vocabulary = self.engine.vocabulary
        packed = info["memory"]["weights"] + info["memory"]["tables"]
        self.details = {
            "packed_bytes": packed,
            "cache_bytes_per_token": info["cache"]["bytes_per_token"],
        }

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """One sequence a step at a time; of several, the seconds of decoding are shared out among them."""
        if self.sequences == 1:
            return super().run(prompt, tokens)
        began = time.perf_counter()
        states = [self.engine.state() for _ in range(self.sequences)]
        for shift, state in enumerate(states):  # each its own prompt
            state.extend(np.roll(np.array(prompt, np.int64), shift))
        prefilled = time.perf_counter()
        advance_greedily(states, tokens)
        decoded = time.perf_counter() - prefilled
        return (prefilled - began) / self.sequences, decoded / self.sequences

    def start(self, prompt: list[int]) -> int:
        self.state = self.engine.state()
        self.state.extend(np.array(prompt, np.int64))
        return int(self.state.logits.argmax())

    def step(self, token: int) -> int:
        self.state.append(token)
        return int(self.state.logits.argmax())


if __name__ == "__main__":
    main(None, prepare, Paring)
