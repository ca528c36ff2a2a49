"""Greedy decoding in torch, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..modifiers.quantization.cache import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def greedy(model: PreTrainedModel, ids: list[int]) -> Iterator[int]:
    """The likeliest token after `ids`, then the one after that, without end; call under `inference_mode`."""
    cache = cache_argument(model)
    if cache is None:
        raise TypeError(f"{type(model).__name__} takes no cache")
    output = model(torch.tensor([ids], device=model.device), use_cache=True)
    while True:
        token = output.logits[:, -1:].argmax(-1)
        yield int(token)
        output = model(token, **{cache: output[cache]}, use_cache=True)
