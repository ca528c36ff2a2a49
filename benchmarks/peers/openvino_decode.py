"""OpenVINO, a model exported by optimum-intel and compressed by NNCF; `protocol.py` says what is asked of this script.

Weights are int8 per row, or int4 in groups of 64 with an int8 embedding and head; other settings are the runtime's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import openvino
from protocol import Stepwise, made_once, main

COMPRESSION = {
    "fp32": None,
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0},
}


def folder(options: argparse.Namespace) -> Path:
    return options.work / f"openvino-{options.variant}"


def prepare(options: argparse.Namespace) -> None:
    with made_once(folder(options)) as part:
        if part is None:
            return
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        settings = COMPRESSION[options.variant]
        model = OVModelForCausalLM.from_pretrained(
            options.model,
            export=True,
            compile=False,
            load_in_8bit=False,
            quantization_config=OVWeightQuantizationConfig(**settings) if settings else None,
        )
        model.save_pretrained(part)


class OpenVino(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        path = folder(options)
        config = json.loads((options.model / "config.json").read_text())
        self.version = openvino.__version__.partition("-")[0]
        self.vocabulary = config["vocab_size"]
        size = (path / "openvino_model.bin").stat().st_size
        width = {"fp32": 4, "int8": 1, "int4": 1}[options.variant]
        spared = 0 if config["tie_word_embeddings"] else self.vocabulary * config["hidden_size"]
        self.bytes_per_token = size - spared * width
        settings = {
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **({"INFERENCE_PRECISION_HINT": "f32"} if options.variant == "fp32" else {}),
        }
        model = openvino.Core().read_model(path / "openvino_model.xml")
        self.request = openvino.compile_model(model, "CPU", settings).create_infer_request()

    def start(self, prompt: list[int]) -> int:
        self.request.reset_state()
        self.length = 0
        return self._forward(prompt)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        count = len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length + count), np.int64),
            "position_ids": np.arange(self.length, self.length + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.length += count
        found = self.request.infer(inputs, share_inputs=True, share_outputs=True)
        return int(found["logits"][0, -1].argmax())


if __name__ == "__main__":
    main(tuple(COMPRESSION), prepare, OpenVino)
