"""Held zeros: for each pruned parameter, which weights are kept. A zero once held stays zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import nn

from ..errors import LawError

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam")
)
"""Optimizers whose statistics of a weight depend on that weight's own gradients and value alone."""


class Masks:
    """Boolean masks by parameter name (`<module>.weight`); True means kept."""

    def __init__(self) -> None:
        self._masks: dict[str, torch.Tensor] = {}
        self._zeroed: dict[
            tuple[str, int], tuple[ref[torch.Tensor], ref[torch.Tensor]]
        ] = {}  # moments, and the masks they were zeroed by

    def hold(self, name: str, mask: torch.Tensor) -> None:
        """Hold the zeros of `mask` (bool, the parameter's shape) from now on; the weights are not touched.

        Raises LawError if the mask would free a zero that is held already.
        """
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask of {name} is {mask.dtype}, not torch.bool")
        old = self._masks.get(name)
        if old is not None:
            if old.shape != mask.shape:
                raise ValueError(f"mask of {name} is {tuple(mask.shape)}, held {tuple(old.shape)}")
            freed = int((mask & ~old.to(mask.device)).sum())
            if freed:
                raise LawError(f"{name}: {freed} held zeros would be freed; a held zero stays zero")
        self._masks[name] = mask.detach().clone()

    def to(self, device: torch.device) -> None:
        """Move the masks, as the model they belong to is moved."""
        self._masks = {name: mask.to(device) for name, mask in self._masks.items()}

    def cut(self, name: str, dim: int, kept: torch.Tensor) -> None:
        """The parameter has lost all but the rows (`dim` 0) or columns (1) `kept`, int64 indices: so does its mask."""
        if name in self._masks:
            mask = self._masks[name]
            self._masks[name] = mask.index_select(dim, kept.to(mask.device))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masks[name]

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, name: str) -> torch.Tensor | None:
        return self._masks.get(name)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._masks.items()

    def sparsity(self, name: str) -> float:
        """The fraction of held zeros."""
        mask = self._masks[name]
        return 1.0 - int(mask.sum()) / mask.numel()

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every held weight to zero."""
        for name, mask in self._masks.items():
            _zero(model.get_parameter(name).data, mask)

    @torch.no_grad()
    def apply_to_gradients(self, model: nn.Module) -> None:
        for name, mask in self._masks.items():
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                _zero(gradient, mask)

    @torch.no_grad()
    def apply_to_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's running statistics of held weights: every state tensor of the weight's shape.

        Where the optimizer computes each weight's statistics from its own gradients alone, zeros stay zero as long as
        the gradients are; then a statistic is not written again until it or its mask is another tensor.
        """
        lasting = type(getattr(optimizer, "optimizer", optimizer)) in ELEMENTWISE
        for name, mask, moment in self._moments(model, optimizer):
            seen = self._zeroed.get((name, id(moment)))
            if lasting and seen and seen[0]() is mask and seen[1]() is moment:
                continue
            _zero(moment, mask)
            self._zeroed[name, id(moment)] = (ref(mask), ref(moment))

    def violations(self, model: nn.Module, prefix: str = "") -> list[str]:
        """Names (starting with `prefix`) of parameters in which a held zero is not zero."""
        return [
            name
            for name, mask in self._masks.items()
            if name.startswith(prefix) and _alive(model.get_parameter(name).detach(), mask)
        ]

    def gradient_violations(self, model: nn.Module) -> list[str]:
        gradients = (
            (name, mask, model.get_parameter(name).grad) for name, mask in self._masks.items()
        )
        return [name for name, mask, grad in gradients if grad is not None and _alive(grad, mask)]

    def moment_violations(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
        return [
            name for name, mask, value in self._moments(model, optimizer) if _alive(value, mask)
        ]

    def _moments(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name, mask in self._masks.items():
            for value in optimizer.state.get(model.get_parameter(name), {}).values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    yield name, mask, value

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """One bit per weight: `np.packbits(mask, axis=1, bitorder="little")` of each mask as a matrix."""
        return {name: _pack(mask) for name, mask in self._masks.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self._masks = {name: _unpack(packed) for name, packed in state.items()}


def _pack(mask: torch.Tensor) -> dict[str, Any]:
    matrix = mask.reshape(mask.shape[0], -1).cpu().numpy()
    bits = np.packbits(matrix, axis=1, bitorder="little")
    return {"shape": list(mask.shape), "bits": torch.from_numpy(bits)}


def _unpack(packed: dict[str, Any]) -> torch.Tensor:
    shape = packed["shape"]
    columns = math.prod(shape[1:])
    bits = np.unpackbits(packed["bits"].numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _zero(values: torch.Tensor, mask: torch.Tensor) -> None:
    # The product of the bits with 1 or 0: exact, where that of the numbers makes nan of inf * 0, and on CPUs ten times
    # as fast as masked_fill_. It happens to every weight, gradient and moment at every step.
    values.view(_BITS[values.element_size()]).mul_(mask.to(values.device))


def _alive(values: torch.Tensor, mask: torch.Tensor) -> bool:
    # The largest byte, where any() of booleans takes eight times as long.
    return bool((values.bool() > mask.to(values.device)).view(torch.uint8).max())
