"""Which norm feeds which Linears in a block: found by watching a forward, proved by trying, for any architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..blocks import Block


@dataclass(frozen=True)
class Pair:
    """A norm and the Linears that read its output, all readers there are."""

    name: str
    norm: nn.Module
    consumers: dict[str, nn.Linear]
    offset: float  # the norm multiplies by (offset + weight): 0 usually, 1 in Gemma

    @torch.no_grad()
    def fold(self, scale: torch.Tensor) -> None:
        """Divide the norm's output by `scale` [width] and multiply the consumers' columns by it."""
        weight = self.norm.get_parameter("weight")
        weight.copy_((weight.float() + self.offset) / scale - self.offset)
        bias = getattr(self.norm, "bias", None)
        if bias is not None:
            bias.copy_(bias.float() / scale)
        for linear in self.consumers.values():
            linear.weight.copy_(linear.weight.float() * scale)


@torch.no_grad()
def find_pairs(block: Block) -> tuple[list[Pair], list[str]]:
    """The norm -> Linears pairs of a block that can be smoothed exactly, and the names of norms that can't be.

    A norm is a leaf with a vector `weight` whose output looks like its input. A pair is kept only if scaling it by
    powers of two leaves the block's output as it was: then no other operation reads the norm's output.
    """
    norms = {
        f"{block.name}.{name}": module
        for name, module in block.module.named_modules()
        if _is_vector_leaf(module)
    }
    linears = {
        f"{block.name}.{name}": module
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    produced: dict[str, torch.Tensor] = {}  # kept alive, so that no address is used twice
    read: dict[str, torch.Tensor] = {}

    def produce(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.shape == args[0].shape:
                produced[name] = output

        return hook

    def consume(name: str) -> Callable[[torch.Tensor], None]:
        return lambda x: read.update({name: x})

    block.outputs(batches=1)  # moves the stream to this block: before there are hooks
    handles = [norm.register_forward_hook(produce(name)) for name, norm in norms.items()]
    try:
        block.run({name: consume(name) for name in linears}, batches=1)
    finally:
        for handle in handles:
            handle.remove()
    pairs, refused = [], []
    for name, y in produced.items():
        readers = {
            reader: linears[reader]
            for reader, x in read.items()
            if x.data_ptr() == y.data_ptr() and x.numel() == y.numel()
        }
        if not readers:
            continue
        offset = _offset(norms[name], y)
        pair = None if offset is None else Pair(name, norms[name], readers, offset)
        if pair is not None and _is_exact(pair, block):
            pairs.append(pair)
        else:
            refused.append(name)
    return pairs, refused


def _is_vector_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    leaf = not any(True for _ in module.children())
    return leaf and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _offset(norm: nn.Module, like: torch.Tensor) -> float | None:
    """Whether the norm multiplies by its weight (0) or by 1 + weight (1); None if neither."""
    weight = norm.get_parameter("weight")
    x = torch.linspace(-1, 1, weight.numel(), dtype=like.dtype, device=like.device).unsqueeze(0)
    saved = weight.detach().clone()
    bias = getattr(norm, "bias", None)
    shift = 0.0 if bias is None else bias
    before = norm(x) - shift
    try:
        for offset in (0.0, 1.0):
            weight.copy_(2 * (saved + offset) - offset)
            if torch.allclose(norm(x) - shift, 2 * before, rtol=1e-2, atol=1e-5):
                return offset
    finally:
        weight.copy_(saved)
    return None


def _is_exact(pair: Pair, block: Block) -> bool:
    tensors = [*pair.norm.parameters(), *(linear.weight for linear in pair.consumers.values())]
    saved = [tensor.detach().clone() for tensor in tensors]
    before = block.outputs(batches=1)[0]
    weight = pair.norm.get_parameter("weight")
    powers = torch.arange(weight.numel(), device=weight.device) % 3 - 1
    try:
        pair.fold(2.0**powers)
        after = block.outputs(batches=1)[0]
    finally:
        for tensor, old in zip(tensors, saved, strict=True):
            tensor.copy_(old)
    error = (after - before).float().norm() / before.float().norm().clamp_min(1e-30)
    return bool(error < 64 * torch.finfo(before.dtype).eps)
