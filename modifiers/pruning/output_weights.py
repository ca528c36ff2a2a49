"""How much each output of each Linear matters, in a form that outlives a later rescaling of that output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..hessian import Gram
from ..precision import fast_float32
from .allocation.importance import importance


def output_shares(
    model: nn.Module, linears: dict[str, nn.Linear], tokens: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """E[g^2] E[z^2] by name, f32 [out]: z is an output without its bias, g the gradient of the loss by it.

    The first factor is `importance`, a diagonal of the Fisher information. The product stays what it is when a
    smoothing modifier divides an output by a number and the next Linear's weights make up for it.
    tokens: int64 [samples, length].
    """
    sizes = {name: torch.zeros(linear.weight.shape[0]) for name, linear in linears.items()}

    def watch(name: str) -> Callable[[nn.Linear, object, torch.Tensor], None]:
        def add(module: nn.Linear, args: object, output: torch.Tensor) -> None:
            z = output.detach() if module.bias is None else output.detach() - module.bias.detach()
            sizes[name] += z.reshape(-1, z.shape[-1]).float().square().sum(dim=0).cpu()

        return add

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        with fast_float32():
            squares = importance(model, linears, tokens, seed)
    finally:
        for handle in handles:
            handle.remove()
    return {name: squares[name] * sizes[name] / tokens.numel() for name in linears}


def output_weights(share: torch.Tensor, weight: torch.Tensor, gram: Gram) -> torch.Tensor:
    """What an error at each output counts, relative to the others; f32 [out], positive.

    The root of `share` (see output_shares) over the mean square that the output has now. An output that matters a
    thousandth of the mean or less counts as one of a thousandth: the estimate comes from few tokens.
    """
    with fast_float32():
        now = ((weight @ gram.matrix) * weight).sum(dim=1) / gram.tokens
    squares = torch.where(now > 0, share.to(now.device) / now, 0.0)
    mean = squares.mean()
    if not bool(mean > 0):
        return torch.ones_like(squares)
    return (squares / mean).clamp_min(1e-3).sqrt()
