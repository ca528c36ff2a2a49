"""What removing rows or columns of Linears would cost: Taylor expansions of the loss around zero (Ma et al. 2023)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ....errors import ModelError

Importance = Literal["taylor_first", "taylor_second", "taylor_mix", "magnitude"]


def importance(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    kind: Importance,
    tokens: torch.Tensor | None,
    seen: Callable[[int], None] = lambda count: None,
) -> dict[str, torch.Tensor]:
    """The importance of each weight of the Linears, f32 [out, in] by name, never negative.

    tokens: int64 [samples, length], of which every row is one sample; unused by `magnitude`, which is w^2.
    taylor_first |w g|, taylor_second w^2 h, taylor_mix |w g - w^2 h / 2|: g is the mean over samples of the gradient of
    the sample's mean cross entropy, h the mean of its square (equations 3 to 5 of arXiv 2305.11627, h for the diagonal
    of the Hessian). `seen` is told how many samples are done. Besides the model this holds a gradient, and g or h or
    both, for all the Linears. Raises ModelError when a gradient is not finite.
    """
    weights = {name: linear.weight for name, linear in linears.items()}
    if kind == "magnitude":
        return {name: weight.detach().float().square() for name, weight in weights.items()}
    assert tokens is not None
    first = _zeros(weights) if kind != "taylor_second" else {}
    second = _zeros(weights) if kind != "taylor_first" else {}
    with torch.enable_grad(), _trained(model, weights):
        for count, row in enumerate(tokens, start=1):
            for name, gradient in zip(weights, _gradients(model, weights, row), strict=True):
                if first:
                    first[name].add_(gradient)
                if second:
                    second[name].addcmul_(gradient, gradient)
            seen(count)
    found = {}
    for name, weight in weights.items():
        value = weight.detach().float()
        cost = torch.zeros_like(value)
        if first:
            cost += value * first[name] / len(tokens)
        if second:
            factor = -0.5 if first else 1.0
            cost += factor * value.square() * second[name] / len(tokens)
        if not bool(cost.isfinite().all()):
            raise ModelError(f"{name}: its gradient holds NaN or infinity; check model and data")
        found[name] = cost.abs_()
    return found


def _zeros(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}


def _gradients(
    model: nn.Module, weights: Mapping[str, torch.Tensor], row: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    ids = row[None].to(next(model.parameters()).device)
    output: Any = model(input_ids=ids, labels=ids, use_cache=False)
    return torch.autograd.grad(output.loss, list(weights.values()))


@contextlib.contextmanager
def _trained(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gradients for these weights alone meanwhile."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = {id(weight) for weight in weights.values()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
