"""Which output channel of one Linear each input of another follows, found by scaling channels and looking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..blocks import Block

BASE = (
    8  # a channel's number is read digit by digit in this base, as a power of two from 2^-4 to 2^3
)
LOWEST = -4


@torch.no_grad()
def channels_of(
    block: Block, source: nn.Linear, reader: str, read: torch.Tensor
) -> torch.Tensor | None:
    """int64 [inputs of the reader]: the channel of `source` [out, in] that each of them is proportional to.

    None where they aren't; -1 for an input that is always 0 and so tells nothing. So up_proj feeds down_proj
    (gate * up is linear in up), v_proj feeds o_proj (attention mixes tokens, never channels; with grouped queries a
    channel of v goes to several heads), and fc1 feeds fc2 where a ReLU stands between. Each row of the source is
    scaled by a power of two that is one digit of its number; scaling by powers of two is exact, so an input that
    follows one channel is scaled by that power, exactly.

    reader, read: the reading Linear's name and its input in the first batch.
    """
    channels = source.weight.shape[0]
    largest = _largest(read)
    if read.shape[-1] % channels or not largest.any():
        return None
    numbers = torch.arange(channels, device=read.device)
    index = torch.zeros(read.shape[-1], dtype=torch.int64, device=read.device)
    place = 1
    while place < channels:
        scale = 2.0 ** (numbers // place % BASE + LOWEST)
        seen = _input_when_scaled(block, source, scale, reader)
        power = torch.log2(_largest(seen) / largest).nan_to_num(LOWEST, LOWEST, LOWEST).round()
        # Not even a neighbour's power: it never reaches the reader.
        if place == 1 and not bool(power.any()):
            return None
        digit = power.to(torch.int64) - LOWEST
        if bool(((digit < 0) | (digit >= BASE)).any()):
            return None
        if not torch.allclose(seen, read * 2**power, rtol=1e-4, atol=0):
            return None
        index += place * digit
        place *= BASE
    index = torch.where(largest > 0, index, -1)
    return index if int(index.max()) < channels else None


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).abs().amax(dim=0).float()


def _input_when_scaled(
    block: Block, source: nn.Linear, scale: torch.Tensor, reader: str
) -> torch.Tensor:
    """The reader's input in the first batch while the source's rows are multiplied by `scale` [out]."""
    saved = [parameter.detach().clone() for parameter in source.parameters()]
    seen: list[torch.Tensor] = []
    try:
        source.weight.mul_(scale.unsqueeze(1))
        if source.bias is not None:
            source.bias.mul_(scale)
        block.run({reader: seen.append}, batches=1)
    finally:
        for parameter, old in zip(source.parameters(), saved, strict=True):
            parameter.copy_(old)
    return seen[0]
