"""Keys and values of an attention as int8: calibrated once, one scale for each key/value head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import ModelError
from .layer import EPSILON, INT8

if TYPE_CHECKING:
    from ..blocks import Block

# What attentions call their cache: transformers renamed it in 5.24.
ARGUMENTS = ("past_key_values", "cache")


@dataclass
class CacheQuantization:
    """The cache of one attention: `q = clamp(round(x / scale), -128, 127)`; scales f32 [kv_heads].

    Keys are rounded as they are stored, after the rotation. A scale per head and not per tensor: the heads' ranges
    differ, and to an engine a scale per head costs one product for each score and each output.
    """

    module: nn.Module = field(repr=False, compare=False)
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    _handle: RemovableHandle | None = field(default=None, repr=False, compare=False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"key_scale": self.key_scale, "value_scale": self.value_scale}

    @classmethod
    def from_state(cls, module: nn.Module, state: dict[str, torch.Tensor]) -> CacheQuantization:
        return cls(module, state["key_scale"], state["value_scale"])

    def to(self, device: torch.device) -> None:
        """Move the scales, as the module is moved."""
        self.key_scale, self.value_scale = self.key_scale.to(device), self.value_scale.to(device)

    def attach(self) -> None:
        """Round keys and values from now on; idempotent."""
        self.detach()
        self._handle = _watch(self.module, self._round)

    def detach(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _round(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _rounded(key, self.key_scale), _rounded(value, self.value_scale)


def calibrate(block: Block) -> dict[str, CacheQuantization]:
    """The quantization of each attention's cache in a block, by module name: min-max over the calibration.

    ModelError when the block has no attention that takes a cache.
    """
    attentions = {
        f"{block.name}.{name}": module
        for name, module in block.module.named_modules()
        if name and cache_argument(module) is not None
    }
    if not attentions:
        raise ModelError(
            f"{block.name} has no attention with a `{ARGUMENTS[0]}`, so no cache to quantize; leave kv_cache out"
        )
    largest: dict[str, list[torch.Tensor]] = {}

    def observe(name: str) -> Any:
        def look(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = [x.abs().amax(dim=(0, 2, 3)).float() for x in (key, value)]
            before = largest.get(name, found)
            largest[name] = [torch.maximum(a, b) for a, b in zip(before, found, strict=True)]
            return key, value

        return look

    handles = [_watch(module, observe(name)) for name, module in attentions.items()]
    try:
        block.outputs()
    finally:
        for handle in handles:
            handle.remove()
    missing = attentions.keys() - largest.keys()
    if missing:
        raise ModelError(f"{min(missing)} never stored keys and values; leave kv_cache out")
    return {
        name: CacheQuantization(module, _scale(largest[name][0]), _scale(largest[name][1]))
        for name, module in attentions.items()
    }


def cache_argument(module: nn.Module) -> str | None:
    """The name of the argument by which an attention or a whole model takes a cache, if it does.

    A model's outputs have the cache under the same name.
    """
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ARGUMENTS if name in parameters), None)


def _scale(amax: torch.Tensor) -> torch.Tensor:
    scale = amax / 127.5
    return torch.where(scale == 0, EPSILON, scale)


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [batch, kv_heads, length, head_dim]; gradients pass straight through."""
    step = scale.to(x).reshape(1, -1, 1, 1)
    with torch.no_grad():
        value = (x / step).round_().clamp_(*INT8).mul_(step)
    return x + (value - x).detach() if x.requires_grad else value


class _Cache:
    """Stands before the cache that an attention is given, if any: `change` sees what would be stored."""

    def __init__(self, change: Any, cache: Any) -> None:
        self._change = change
        self._cache = cache

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._change(key, value)
        if self._cache is None:
            return key, value
        found: tuple[torch.Tensor, torch.Tensor] = self._cache.update(key, value, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _watch(module: nn.Module, change: Any) -> RemovableHandle:
    argument = cache_argument(module)
    assert argument is not None

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, argument: _Cache(change, kwargs.get(argument))}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
