"""Paring's engine under the same protocol; `protocol.py` says what is asked of this script.

A variant is PATTERN@SPARSITY/DTYPE, as in `1x4@0.7/int4`, or `fp32`. The graphs are pruned by magnitude and rounded,
for their speed alone: int8 per row or int4 in groups of 64, with int8 inputs and an int8 head.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from protocol import Stepwise, made_once, main

from paring.engine import Engine


def graph_folder(options: argparse.Namespace) -> Path:
    return Path(options.work) / f"paring-{options.variant.replace('/', '-').replace(':', 'of')}"


def prepare(options: argparse.Namespace) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from pattern_graphs import dense_graph, write_pruned

    from paring.engine.export import export

    folder = graph_folder(options)
    with made_once(folder) as part:
        if part is None:
            return
        if options.variant == "fp32":
            export(options.model, part)
            return
        structure, dtype = options.variant.split("/")
        pattern, _, sparsity = structure.partition("@")
        dense = dense_graph(str(options.model), Path(options.work) / "paring-int8-head")
        write_pruned(dense, pattern, float(sparsity), dtype, part)


class Paring(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        import paring

        self.engine = Engine.load(graph_folder(options), threads=options.threads)
        info = self.engine.info()
        self.version = f"{paring.__version__}, row {info['kernels']}"
        self.bytes_per_token = info["bytes_per_token"]
        self.vocabulary = self.engine.vocabulary

    def start(self, prompt: list[int]) -> int:
        self.state = self.engine.state()
        self.state.extend(np.array(prompt, np.int64))
        return int(self.state.logits.argmax())

    def step(self, token: int) -> int:
        self.state.append(token)
        return int(self.state.logits.argmax())


if __name__ == "__main__":
    main(None, prepare, Paring)
