"""CTranslate2's greedy generation; `protocol.py` says what is asked of this script.

It has no call for a single step: decoding is generation of 1 + N tokens, less that of one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import ctranslate2
from protocol import made_once, main

VARIANTS = ("int8", "fp32")


def folder(options: argparse.Namespace) -> Path:
    return options.work / f"ctranslate2-{options.variant}"


def prepare(options: argparse.Namespace) -> None:
    with made_once(folder(options)) as part:
        if part is not None:
            converter = ctranslate2.converters.TransformersConverter(str(options.model))
            kind = {"int8": "int8", "fp32": "float32"}[options.variant]
            converter.convert(str(part), quantization=kind, force=True)


class CTranslate2:
    def __init__(self, options: argparse.Namespace) -> None:
        path = folder(options)
        self.version = ctranslate2.__version__
        self.words = json.loads((path / "vocabulary.json").read_text())
        config = json.loads((options.model / "config.json").read_text())
        self.vocabulary = config["vocab_size"]
        size = (path / "model.bin").stat().st_size
        width = {"int8": 1, "fp32": 4}[options.variant]
        spared = 0 if config["tie_word_embeddings"] else self.vocabulary * config["hidden_size"]
        self.bytes_per_token = size - spared * width
        self.generator = ctranslate2.Generator(
            str(path),
            compute_type={"int8": "int8", "fp32": "float32"}[options.variant],
            inter_threads=1,
            intra_threads=options.threads,
        )

    def run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        words = [self.words[token] for token in prompt]
        one = self._generate(words, 1)
        return one, self._generate(words, 1 + tokens) - one if tokens else 0.0

    def _generate(self, words: list[str], count: int) -> float:
        began = time.perf_counter()
        (found,) = self.generator.generate_batch(
            [words],
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        seconds = time.perf_counter() - began
        if len(found.sequences[0]) != count:
            raise RuntimeError(f"asked for {count} tokens, got {len(found.sequences[0])}")
        return seconds


if __name__ == "__main__":
    main(VARIANTS, prepare, CTranslate2)
