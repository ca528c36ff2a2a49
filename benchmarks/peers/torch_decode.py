"""torch, eager, with the attention and cache of transformers; `protocol.py` says what is asked of this script."""

from __future__ import annotations

import argparse

import torch
from protocol import Stepwise, main
from transformers import AutoModelForCausalLM, DynamicCache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Torch(Stepwise):
    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.variant])
        self.model = model.eval()
        self.version = torch.__version__
        self.vocabulary = model.config.vocab_size
        weights = sum(part.numel() * part.element_size() for part in model.parameters())
        embedding = model.get_input_embeddings().weight
        tied = embedding is model.get_output_embeddings().weight
        spared = 0 if tied else embedding.numel() * embedding.element_size()
        self.bytes_per_token = weights - spared

    def start(self, prompt: list[int]) -> int:
        self.cache = DynamicCache()
        return self._forward(prompt)

    def step(self, token: int) -> int:
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> int:
        tokens = torch.tensor([ids])
        found = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())


if __name__ == "__main__":
    main(tuple(DTYPES), lambda options: None, Torch)
