"""What feeds which Linears of a block: found by watching it compute, proved by trying, for any architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .channels import channels_of

if TYPE_CHECKING:
    from ..blocks import Block


@dataclass(frozen=True)
class Pair:
    """A source, a norm or a Linear, and the Linears that read what it makes: all readers there are.

    index: int64 [inputs of the consumers], the source's channel that each of their inputs follows, -1 where that is
    not known; None for a norm, where it is the input's own number. With grouped queries one channel of v is followed
    by several inputs of o.
    """

    name: str
    source: nn.Module
    consumers: dict[str, nn.Linear]
    offset: float = 0.0  # a norm multiplies by (offset + weight): 0 usually, 1 in Gemma
    index: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """The number of the source's channels."""
        return self.source.get_parameter("weight").shape[0]

    @property
    def kind(self) -> str:
        return "linear" if isinstance(self.source, nn.Linear) else "norm"

    def gather(self, largest: torch.Tensor) -> torch.Tensor:
        """The largest of each source channel's values, from values >= 0 by consumer input; f32 [width]."""
        if self.index is None:
            return largest
        known = self.index >= 0
        found = torch.zeros(self.width, dtype=largest.dtype, device=largest.device)
        return found.scatter_reduce(0, self.index[known], largest[known], "amax")

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale per source channel [width] as one per consumer input; 1 where not all readers are known."""
        if self.index is None:
            return scale
        return torch.where(self.index < 0, 1.0, self._allowed(scale)[self.index])

    def _allowed(self, scale: torch.Tensor) -> torch.Tensor:
        if self.index is None:
            return scale
        readers = torch.bincount(self.index[self.index >= 0], minlength=self.width)
        return torch.where(readers == self.index.numel() // self.width, scale, 1.0)

    @torch.no_grad()
    def fold(self, scale: torch.Tensor) -> None:
        """Divide the source's output by `scale` [width] and multiply the consumers' columns by it."""
        weight = self.source.get_parameter("weight")
        if weight.ndim == 1:
            weight.copy_((weight.float() + self.offset) / scale - self.offset)
        else:
            weight.copy_(weight.float() / self._allowed(scale).unsqueeze(1))
        bias = getattr(self.source, "bias", None)
        if bias is not None:
            bias.copy_(bias.float() / self._allowed(scale))
        for linear in self.consumers.values():
            linear.weight.copy_(linear.weight.float() * self.spread(scale))

    def tensors(self) -> list[torch.Tensor]:
        """What `fold` changes."""
        weights = [linear.weight for linear in self.consumers.values()]
        return [*self.source.parameters(recurse=False), *weights]


Channels = dict[tuple[str, str], torch.Tensor]
"""`channels_of`, where it is whole, by the names of source and reader in their block: alike in all blocks."""


@torch.no_grad()
def find_pairs(block: Block, channels: Channels | None = None) -> tuple[list[Pair], list[str]]:
    """The pairs of a block that can be smoothed exactly, and the names of norms that can't be.

    First norms, in the order in which they compute, then Linears (`channels_of` says which channel feeds which input).
    A pair is kept only if scaling it by powers of two leaves the block's output as it was: then no other operation
    reads what the source makes. `channels`: what earlier blocks were found to be like; added to.
    """
    channels = {} if channels is None else channels
    before = block.outputs(batches=1)[0]  # moves the stream to this block: before there are hooks
    linears = {
        f"{block.name}.{name}": module
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    produced, read = _watch(block, linears)
    pairs, refused = [], []
    for name, (norm, y) in produced.items():
        readers = {
            reader: linears[reader]
            for reader, x in read.items()
            if x.data_ptr() == y.data_ptr() and x.numel() == y.numel()
        }
        if not readers:
            continue
        offset = _offset(norm, y)
        pair = None if offset is None else Pair(name, norm, readers, offset)
        if pair is not None and _is_exact(pair, block, before):
            pairs.append(pair)
        else:
            refused.append(name)
    fed = {reader for pair in pairs for reader in pair.consumers}
    order = list(read)  # of computing
    for position, reader in enumerate(order):
        if reader in fed or any(_same(read[reader], read[other]) for other in order[:position]):
            continue
        consumers = {n: linears[n] for n in order[position:] if _same(read[n], read[reader])}
        for name in order[:position]:
            key = name.removeprefix(block.name), reader.removeprefix(block.name)
            index = channels.get(key)
            if index is None:
                index = channels_of(block, linears[name], reader, read[reader])
                if index is not None and bool((index >= 0).all()):
                    channels[key] = index
            if index is None or index.numel() != read[reader].shape[-1]:
                continue
            pair = Pair(name, linears[name], consumers, index=index)
            if _is_exact(pair, block, before):
                pairs.append(pair)
                break
    return pairs, refused


def _watch(
    block: Block, linears: dict[str, nn.Linear]
) -> tuple[dict[str, tuple[nn.Module, torch.Tensor]], dict[str, torch.Tensor]]:
    """One forward: norms with what they made, and the input of each Linear, in the order of computing.

    A norm is a leaf with a vector `weight` whose output looks like its input. The tensors are kept alive, so that no
    address is used twice.
    """
    produced: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    read: dict[str, torch.Tensor] = {}

    def produce(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.shape == args[0].shape:
                produced[name] = module, output

        return hook

    def consume(name: str) -> Callable[[torch.Tensor], None]:
        return lambda x: read.update({name: x})

    handles = [
        module.register_forward_hook(produce(f"{block.name}.{name}"))
        for name, module in block.module.named_modules()
        if _is_vector_leaf(module)
    ]
    try:
        block.run({name: consume(name) for name in linears}, batches=1)
    finally:
        for handle in handles:
            handle.remove()
    return produced, read


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


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


def _is_exact(pair: Pair, block: Block, before: torch.Tensor) -> bool:
    tensors = pair.tensors()
    saved = [tensor.detach().clone() for tensor in tensors]
    powers = torch.arange(pair.width, device=before.device) % 3 - 1
    try:
        pair.fold(2.0**powers)
        after = block.outputs(batches=1)[0]
    finally:
        for tensor, old in zip(tensors, saved, strict=True):
            tensor.copy_(old)
    error = (after - before).float().norm() / before.float().norm().clamp_min(1e-30)
    return bool(error < 64 * torch.finfo(before.dtype).eps)
