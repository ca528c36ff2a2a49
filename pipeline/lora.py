"""LoRA: training a few added parameters instead of the weights, through `peft`; in the end they become part of them.

A Linear whose zeros are held computes with `W + mask * (B A) * scale` all along, so what is trained is exactly what the
merged weight holds, and every zero stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..errors import ModelError

if TYPE_CHECKING:
    from ..modifiers import Masks
    from ..recipes import LoraConfig

ADAPTER = "default"


@contextmanager
def adapters(model: Any, config: LoraConfig | None, masks: Masks, seed: int) -> Iterator[None]:
    """Meanwhile only LoRA's parameters are trained; when the work is done they are merged into the weights.

    `model` keeps its class and the names of its modules and weights. Raises ModelError without `peft`, or when
    `target_modules` matches no Linear.
    """
    if config is None:
        yield
        return
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    _inject(model, config, seed)
    wrapped = _wrapped(model)
    for name, layer in wrapped.items():
        _mask_forward(layer, masks, f"{name}.weight")
    yield
    with torch.no_grad():
        for name, layer in wrapped.items():
            delta = layer.get_delta_weight(ADAPTER)
            mask = masks.get(f"{name}.weight")
            base = layer.get_base_layer()
            if mask is not None:
                delta = delta.masked_fill(~mask.to(delta.device), 0)
            base.weight.add_(delta)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _inject(model: Any, config: LoraConfig, seed: int) -> None:
    try:
        import peft
    except ImportError:
        raise ModelError(
            'training with `lora` needs the package peft; install it with `pip install "peft>=0.14"`'
        ) from None
    head = model.get_output_embeddings()
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    wanted = config.target_modules
    names = [
        name
        for name in linears
        if wanted is None or any(name == t or name.endswith(f".{t}") for t in wanted)
    ]
    if not names:
        raise ModelError(
            f"lora: target_modules {wanted} matches no Linear; leave it out for all, or name some such as"
            f" {', '.join(dict.fromkeys(n.rpartition('.')[2] for n in linears))}"
        )
    made = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(made, model, ADAPTER)


def _wrapped(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}


def _mask_forward(layer: Any, masks: Masks, name: str) -> None:
    """The mask is looked up each time: a modifier of this stage may make it, and may take more weights away."""
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if name not in masks:
            return plain(x)  # type: ignore[no-any-return]
        base, dropout = layer.get_base_layer(), layer.lora_dropout[ADAPTER]
        mask = masks[name].to(base.weight.device)
        delta = layer.get_delta_weight(ADAPTER).masked_fill(~mask, 0)
        if isinstance(dropout, nn.Identity):
            return linear(x, base.weight + delta, base.bias)
        return linear(x, base.weight, base.bias) + linear(dropout(x), delta)

    layer.forward = forward
