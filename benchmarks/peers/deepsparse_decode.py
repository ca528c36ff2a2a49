"""DeepSparse 1.8, decoding beside a cache of 32 tokens outside of it; `protocol.py` says what is asked of this script.

Its own cache and its prefill crashed on this model, and a short cache flatters it: attention over 32 tokens costs less
than over the prompt that the others have. The inputs of its int8 matrices have scales made up for speed alone; sparse
variants are pruned by magnitude. Where the CPU has no VNNI it computes
int8 exactly unless NM_FAST_VNNI_EMULATION=1 is set.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from checkpoint import Llama
from onnx_llama import write_decoder
from protocol import made_once, main

PAST = 31
VARIANTS = {
    "fp32": (False, 0.0),
    "int8": (True, 0.0),
    **{f"int8-{s}": (True, s / 100) for s in (70, 80, 90)},
}


def onnx_file(options: argparse.Namespace) -> Path:
    return options.work / f"deepsparse-{options.variant}" / "model.onnx"


def prepare(options: argparse.Namespace) -> None:
    file = onnx_file(options)
    with made_once(file.parent) as part:
        if part is not None:
            int8, sparsity = VARIANTS[options.variant]
            write_decoder(Llama.read(options.model), int8, sparsity, PAST, part / file.name)


class DeepSparse:
    def __init__(self, options: argparse.Namespace) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "1"
        from deepsparse.engine import Engine
        from deepsparse.version import __version__

        self.version = __version__
        self.model = Llama.read(options.model)
        self.vocabulary = self.model.vocabulary
        int8, sparsity = VARIANTS[options.variant]
        # What it stores is its own; counted as a mask of bits and what is kept.
        m = self.model
        weights = m.layers * m.hidden * (2 * m.hidden + 2 * m.kv_heads * m.head_size)
        weights += m.layers * m.hidden * 3 * m.intermediate
        kept = 1.0 if sparsity == 0 else 1 - sparsity + (0.125 if int8 else 0.03125)
        width = 1 if int8 else 4
        self.bytes_per_token = int(width * (weights * kept + m.vocabulary * m.hidden))
        file = onnx_file(options)
        self.engine = Engine(str(file), batch_size=1, num_cores=options.threads)
        self.names = list(self.engine.output_names)

    def run(self, prompt: list[int], tokens: int) -> tuple[None, float]:
        """Decoding alone: the prompt's last token comes first, its keys and values are zeros."""
        shape = (1, self.model.kv_heads, PAST, self.model.head_size)
        kinds = [f"{kind}{layer}" for layer in range(self.model.layers) for kind in "kv"]
        past = {kind: np.zeros(shape, np.float32) for kind in kinds}
        token = np.array([[prompt[-1]]])
        began = time.perf_counter()
        for index in range(tokens):
            cos, sin = (part[None, None] for part in self.model.angles(PAST + index, 1))
            inputs = [token, cos, sin, *(past[kind] for kind in kinds)]
            found = dict(zip(self.names, self.engine.run(inputs, val_inp=False), strict=True))
            for kind in kinds:
                past[kind][:, :, index % PAST] = found["new_" + kind][:, :, 0]
            token = found["logits"].argmax().reshape(1, 1)
        return None, time.perf_counter() - began


if __name__ == "__main__":
    main(tuple(VARIANTS), prepare, DeepSparse)
