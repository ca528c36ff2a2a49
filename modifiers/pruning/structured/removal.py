"""How many heads and channels go, so that a config can still say it; and taking them out of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ....errors import LawError, ModelError
from ...blocks import find_blocks
from ...masks import Masks
from ...sizes import adopt, shapes, sizes, twin
from .dependency import Dependency, Unit

HeadGroup = Literal["kv", "query"]
Kept = dict[str, torch.Tensor]
"""By Linear (its name inside the block), the int64 indices of rows or columns that stay."""


@dataclass(frozen=True)
class Choice:
    """What is chosen among: from each pool of units, `removed` go, in every block alike."""

    dependency: Dependency
    pools: list[list[Unit]]
    removed: int
    changes: dict[str, int]
    """The config fields that say it."""

    @property
    def size(self) -> int:
        return len(self.pools[0])


def choose(
    model: nn.Module, dependency: Dependency, share: float, head_group: HeadGroup, multiple: int
) -> Choice:
    """Remove `share` of the channels or heads, as nearly as the model's config class can say.

    Kept channels are a multiple of `multiple`. Raises ModelError when the config can't say any number nearer to `share`
    than to keep all, as where a Llama's width must be a multiple of its number of heads.
    """
    if dependency.kind == "channels":
        pools = [dependency.units]
        size = len(dependency.units)
        kept = min(size, max(1, round(size * (1 - share) / multiple)) * multiple)
        counts = [size - kept]
        fields = [
            {name: kept}
            for name, value in sorted(
                sizes(model).items(), key=lambda f: f[0] != "intermediate_size"
            )
            if value == size
        ]
        options = {size - kept: fields}
    else:
        whole = head_group == "kv" or len(dependency.parts[0]) == 1
        pools = [dependency.units] if whole else dependency.parts
        size = len(pools[0])
        counts = sorted(range(size), key=lambda count: (abs(count - share * size), count))
        options = {c: [_head_fields(model, dependency, size, c, whole)] for c in counts}
    refusals: list[str] = []
    for count in counts:
        if count == 0 and refusals:
            break
        if count == 0:
            return Choice(dependency, pools, 0, {})
        wanted = _shapes_without(model, pools, count)
        for changes in options[count]:
            try:
                if shapes(twin(model, changes)) == wanted:
                    return Choice(dependency, pools, count, changes)
                refusals.append(f"{changes} gives other shapes")
            except ModelError as error:
                refusals.append(str(error))
    raise ModelError(
        f"{counts[0]} of {size} {dependency.kind} can't be removed from {', '.join(dependency.linears)}:"
        f" {refusals[0] if refusals else 'no field of the config has their number'};"
        f" give {dependency.kind.removesuffix('s')}_sparsity: 0 to keep them all, or a share that a config can say"
    )


def _head_fields(
    model: nn.Module, dependency: Dependency, size: int, removed: int, whole: bool
) -> dict[str, int]:
    fields = sizes(model)
    heads = fields.get("num_attention_heads", 0)
    changes = {"num_attention_heads": heads * (size - removed) // size}
    if "num_key_value_heads" in fields and whole:
        changes["num_key_value_heads"] = fields["num_key_value_heads"] * (size - removed) // size
    columns = sum(unit.columns[dependency.consumer].numel() for unit in dependency.units)
    changes["head_dim"] = fields.get("head_dim") or columns // max(heads, 1)
    return changes


def _shapes_without(
    model: nn.Module, pools: list[list[Unit]], removed: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters when `removed` units of each pool are gone from every block."""
    found = shapes(model)
    gone = [unit for pool in pools for unit in pool[:removed]]
    for block, _ in find_blocks(model):
        for unit in gone:
            for name, rows in unit.rows.items():
                for key in (f"{block}.{name}.weight", f"{block}.{name}.bias"):
                    if key in found:
                        found[key] = (found[key][0] - len(rows), *found[key][1:])
            for name, columns in unit.columns.items():
                key = f"{block}.{name}.weight"
                found[key] = (found[key][0], found[key][1] - len(columns))
    return found


def staying(linears: Mapping[str, nn.Linear], gone: list[Unit]) -> tuple[Kept, Kept]:
    """The rows and the columns that stay when `gone` are removed; only of the Linears that lose any."""
    rows: Kept = {}
    columns: Kept = {}
    for unit in gone:
        for kept, lost, dim in ((rows, unit.rows, 0), (columns, unit.columns, 1)):
            for name, index in lost.items():
                size = linears[name].weight.shape[dim]
                old = kept.get(name, torch.arange(size))
                kept[name] = old[~torch.isin(old, index)]
    return rows, columns


@torch.no_grad()
def remove(
    model: nn.Module, masks: Masks, gone: Mapping[str, list[Unit]], changes: Mapping[str, int]
) -> None:
    """Take the units `gone` (by block name) out of weights, biases and held masks, and tell the config.

    The columns that go must be zero already: then nothing changes in what the model computes.
    """
    other = twin(model, changes)
    for block, units in gone.items():
        inside = model.get_submodule(block).named_modules()
        linears = {name: module for name, module in inside if isinstance(module, nn.Linear)}
        rows, columns = staying(linears, units)
        for dim, kept in ((0, rows), (1, columns)):
            for name, index in kept.items():
                _cut(linears[name], dim, index)
                masks.cut(f"{block}.{name}.weight", dim, index)
    adopt(model, other, changes)
    if shapes(model) != shapes(other):
        raise LawError("the pruned model's shapes are not those that its config says")


def _cut(linear: nn.Linear, dim: int, kept: torch.Tensor) -> None:
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if dim < parameter.ndim:
            values = parameter.detach().index_select(dim, kept.to(parameter.device)).contiguous()
            setattr(linear, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
