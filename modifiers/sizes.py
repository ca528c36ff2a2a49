"""The sizes a transformers model is built in: read from its config, changed in place, proved by a twin.

A twin is a model of the same class built without memory from a changed config: what a loader will build from the
checkpoint. Structured pruning asks it which shapes the config can say, and takes over its attributes (head counts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def sizes(model: nn.Module) -> dict[str, int]:
    """Every integer field of the model's config; empty for a model without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {}
    return {name: value for name, value in config.to_dict().items() if type(value) is int}


def twin(model: nn.Module, changes: Mapping[str, int]) -> nn.Module:
    """A model of the same class and a config with `changes`, on the meta device.

    Raises ModelError when the config refuses the values or the class can't be built from them.
    """
    if not sizes(model):
        raise ModelError(
            f"{type(model).__name__} has no transformers config, which must hold the new sizes"
        )
    config: Any = model.config
    try:
        changed = type(config).from_dict({**config.to_dict(), **changes})
        with torch.device("meta"):
            built: nn.Module = type(model)(changed)
    except Exception as error:  # whatever a config class or a constructor says no with
        said = " ".join(str(error).split())
        listed = ", ".join(f"{name} {value}" for name, value in changes.items())
        raise ModelError(f"{type(config).__name__} refuses {listed}: {said}") from error
    return built


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def adopt(model: nn.Module, other: nn.Module, changes: Mapping[str, int]) -> None:
    """Take over the integer attributes of every module of the twin `other`, and `changes` into the config."""
    for name, module in model.named_modules():
        for key, value in vars(other.get_submodule(name)).items():
            if type(value) is int and vars(module).get(key) != value:
                setattr(module, key, value)
    for key, value in changes.items():
        setattr(model.config, key, value)


@torch.no_grad()
def resize(model: nn.Module, wanted: Mapping[str, int]) -> None:
    """Give `model` the sizes of a pruned one, before that one's weights are loaded into it.

    Parameters whose shape changes are left unset. Does nothing where the config says `wanted` already.
    """
    own = sizes(model)
    changes = {name: value for name, value in wanted.items() if own.get(name) != value}
    if not changes:
        return
    other = twin(model, changes)
    for name, module in model.named_modules():
        for key, parameter in other.get_submodule(name).named_parameters(recurse=False):
            old = getattr(module, key)
            if old.shape != parameter.shape:
                new = torch.empty(parameter.shape, dtype=old.dtype, device=old.device)
                setattr(module, key, nn.Parameter(new, requires_grad=old.requires_grad))
    adopt(model, other, changes)
