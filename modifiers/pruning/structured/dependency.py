"""Which rows and columns of a block's Linears can only be removed together: found by watching a forward.

One output channel of one Linear at a time becomes NaN, all Linears behind it answering as if nothing had happened;
the input columns that turn NaN are those which depend on it. So the groups follow from what the block computes
(grouped-query attention, gates, norms over heads), not from a table of architectures.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....errors import ModelError
from ...blocks import Block, Stream

Forward = Callable[[torch.Tensor], torch.Tensor]
TOKENS = 3  # more than one: a single token attends to itself whatever the query


@dataclass(frozen=True)
class Unit:
    """The least that can be removed: rows of Linears and the columns, of Linears behind, that read them alone."""

    rows: dict[str, torch.Tensor]
    """int64 row indices by Linear (its name inside the block)."""
    columns: dict[str, torch.Tensor]
    """int64 column indices by Linear."""


@dataclass(frozen=True)
class Dependency:
    """All units that share the same Linears: the heads of an attention, the channels of an MLP."""

    units: list[Unit]
    parts: list[list[Unit]]
    """By unit, what it falls into when Linears with fewer rows than the reader has columns stay whole: the query heads
    of a key-value head. One part, the unit itself, where there is nothing to share."""

    @property
    def linears(self) -> list[str]:
        return sorted({*self.units[0].rows, *self.units[0].columns})

    @property
    def consumer(self) -> str:
        """The Linear that reads the units."""
        (name,) = self.units[0].columns
        return name

    @property
    def kind(self) -> str:
        """`channels`, of which the reader has one column each, or `heads`, of which it has several."""
        return "channels" if self.units[0].columns[self.consumer].numel() == 1 else "heads"


def find_dependencies(model: nn.Module, meant: Collection[str]) -> list[Dependency]:
    """The dependencies of the first block among Linears that are all `meant` (by their names inside the block).

    In the order in which the block computes. The first block stands for all: they are modules of one class. Raises
    ModelError when units differ among each other, or hang together with nothing to choose from.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = next(model.parameters()).device
    tokens = torch.arange(4 * TOKENS, device=device).reshape(4, TOKENS) % vocabulary
    block = Stream(model, tokens).block(0)
    edges = _probe(block)
    found = []
    for sides in _joined([[("rows", source), ("columns", reader)] for source, reader in edges]):
        if {name for _, name in sides} <= set(meant):
            inside = {e: p for e, p in edges.items() if ("rows", e[0]) in sides}
            found.append(_dependency(block.name, inside))
    return found


@torch.no_grad()
def _probe(block: Block) -> dict[tuple[str, str], torch.Tensor]:
    """By Linear and Linear that reads it, bool [out, in]: which output channel reaches which input column directly.

    Linears whose output goes straight into the block's are left out: their channels are the model's width.
    """
    linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}  # every Linear answers with its own, whatever it reads
    with _forwards(linears, lambda name, forward: _recorder(inputs, outputs, name, forward)):
        whole = block.outputs()[0]
    if not bool(whole.isfinite().all()):
        raise ModelError(f"{block.name} computes NaN or infinity; check the model's weights")
    clean = dict(inputs)
    samples = whole.shape[0]
    found: dict[tuple[str, str], torch.Tensor] = {}
    with _forwards(linears, lambda name, _: _replayer(inputs, outputs, name)):
        for name, output in list(outputs.items()):
            reach: dict[str, torch.Tensor] = {}
            for some in torch.arange(output.shape[-1]).split(samples):
                outputs[name] = output.clone()
                for row, channel in enumerate(some):  # some models fold samples and tokens into one
                    outputs[name].view(samples, -1, output.shape[-1])[row, :, channel] = torch.nan
                if bool((block.outputs()[0] != whole).any()):
                    reach.clear()
                    break
                for reader, x in inputs.items():
                    # not only NaN: a fused attention may turn a row of them into zeros
                    changed = (x != clean[reader]).view(samples, -1, x.shape[-1]).any(dim=1)
                    if bool(changed.any()):
                        pattern = torch.zeros(output.shape[-1], x.shape[-1], dtype=torch.bool)
                        reach.setdefault(reader, pattern)[some] = changed[: len(some)].cpu()
            outputs[name] = output
            found.update({(name, reader): pattern for reader, pattern in reach.items()})
    return found


@contextlib.contextmanager
def _forwards(
    linears: dict[str, nn.Linear], replace: Callable[[str, Forward], Forward]
) -> Iterator[None]:
    """Other `forward` methods meanwhile."""
    originals = {name: linear.forward for name, linear in linears.items()}
    patched = {name for name, linear in linears.items() if "forward" in vars(linear)}
    try:
        for name, linear in linears.items():
            linear.forward = replace(name, originals[name])  # type: ignore[method-assign, assignment]
        yield
    finally:
        for name, linear in linears.items():
            if name in patched:
                linear.forward = originals[name]  # type: ignore[method-assign]
            else:
                del linear.forward


def _recorder(
    inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], name: str, forward: Forward
) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        inputs[name], outputs[name] = x, forward(x)
        return outputs[name]

    return run


def _replayer(
    inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], name: str
) -> Forward:
    def run(x: torch.Tensor) -> torch.Tensor:
        inputs[name] = x
        return outputs[name]

    return run


def _dependency(block: str, edges: dict[tuple[str, str], torch.Tensor]) -> Dependency:
    readers = {reader for _, reader in edges}
    names = ", ".join(sorted({name for edge in edges for name in edge}))
    if len(readers) != 1:
        raise ModelError(f"{block}: {names}: one output is read by several Linears; unknown form")
    units = _units(edges)
    alike = {
        tuple((name, index.numel()) for name, index in (*u.rows.items(), *u.columns.items()))
        for u in units
    }
    if len(alike) != 1 or len(units) < 2:
        reason = "their groups differ in size" if len(alike) != 1 else "they hang together whole"
        raise ModelError(
            f"{block}: nothing can be removed from {names}: {reason}; name them in `ignore`"
        )
    wide = {e: p for e, p in edges.items() if p.shape[0] >= p.shape[1]}
    small = _units(wide)
    (reader,) = readers
    owner = {int(c): i for i, u in enumerate(units) for c in u.columns[reader]}
    parts: list[list[Unit]] = [[] for _ in units]
    for part in small:
        parts[owner[int(part.columns[reader][0])]].append(part)
    if len(wide) == len(edges) or len({len(p) for p in parts}) != 1:
        parts = [[unit] for unit in units]
    return Dependency(units, parts)


def _units(edges: dict[tuple[str, str], torch.Tensor]) -> list[Unit]:
    """Connected sets of rows and columns, ordered by their first column."""
    pairs: list[list[Any]] = []
    for (source, reader), pattern in edges.items():
        for row, reached in enumerate(pattern):
            columns = reached.nonzero().flatten().tolist()
            pairs.append([(0, source, row), *((1, reader, column) for column in columns)])
    units = []
    for nodes in _joined(pairs):
        sides: tuple[dict[str, list[int]], dict[str, list[int]]] = (
            defaultdict(list),
            defaultdict(list),
        )
        for side, name, index in sorted(nodes):
            sides[side][name].append(index)
        rows, columns = ({n: torch.tensor(i) for n, i in side.items()} for side in sides)
        units.append(Unit(rows, columns))
    return sorted(units, key=lambda u: min((int(c[0]) for c in u.columns.values()), default=-1))


def _joined(sets: list[list[Any]]) -> list[set[Any]]:
    """Merge lists that share an element (union-find)."""
    parent: dict[Any, Any] = {}

    def root(node: Any) -> Any:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for members in sets:
        for node in members:
            parent[root(node)] = root(members[0])
    merged: dict[Any, set[Any]] = defaultdict(set)
    for node in parent:
        merged[root(node)].add(node)
    return list(merged.values())
