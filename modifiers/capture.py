"""The decoder blocks of a model, and what the model passes to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError, ModelError

BATCH = 4  # calibration sequences per replayed batch


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their names: the longest list of same-class modules that is not inside another block.

    Raises ModelError when the model has none.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        same = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if (
            same
            and not inside
            and any(True for child in module.children() for _ in child.children())
        ):
            assert isinstance(module, nn.ModuleList)
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks (an nn.ModuleList of modules of one class)"
        )
    name, blocks = max(found, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


@dataclass
class Call:
    """What the model passes to a block besides the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stop(Exception):
    """Ends a forward once everything asked for has been seen."""


@torch.no_grad()
def capture(
    model: nn.Module,
    calibration: torch.Tensor,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden,
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """The inputs of the first block, by batch, and the other arguments of every block, by block and batch.

    calibration: int64 [samples, length]. The blocks hand their input through unchanged meanwhile, so this costs one
    embedding lookup, and `keep` says where they are to live. Blocks may still get different masks or position
    embeddings (sliding windows).
    """
    if calibration.ndim != 2 or calibration.numel() == 0:
        raise DataError(
            f"calibration must be token ids [samples, length], got {tuple(calibration.shape)}"
        )
    blocks = find_blocks(model)
    inputs: list[torch.Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    device = next(model.parameters()).device
    returns_tuple = _returns_tuple(model, blocks[0][1], calibration[:1, :2].to(device))

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, kwargs = _split(args, kwargs)
            if index == 0:
                inputs.append(keep(hidden))
            calls[index].append(Call(rest, kwargs))
            if index == len(blocks) - 1:
                raise Stop
            return (hidden,) if returns_tuple else hidden

        return forward

    originals = [block.forward for _, block in blocks]
    try:
        for index, (_, block) in enumerate(blocks):
            block.forward = recorder(index)
        for batch in torch.split(calibration, BATCH):
            try:
                model(batch.to(device), use_cache=False)
            except Stop:
                continue
            raise ModelError(f"a forward of {type(model).__name__} never reached its last block")
    finally:
        for (_, block), original in zip(blocks, originals, strict=True):
            if "forward" in vars(block):
                del block.forward
            if block.forward != original:  # somebody had replaced the method before us
                block.forward = original
    return inputs, calls


def _returns_tuple(model: nn.Module, block: nn.Module, tokens: torch.Tensor) -> bool:
    results: list[Any] = []
    handle = block.register_forward_hook(lambda module, args, output: results.append(output))
    try:
        model(tokens, use_cache=False)
    finally:
        handle.remove()
    return isinstance(results[0], tuple)


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the hidden states out of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
