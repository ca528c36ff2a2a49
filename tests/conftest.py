"""A model small enough that a test of it takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from paring.modifiers import base


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pico() -> Callable[[int], PreTrainedModel]:
    def make(seed: int = 0, layers: int = 2) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def calibration() -> torch.Tensor:
    return torch.randint(0, 128, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modifiers that a test defines vanish with it."""
    monkeypatch.setattr(base, "_registry", dict(base._registry))
