"""Structures that recipes prune to: which layout the engine gives them, and what it reads then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference_interpreter
from handmade import Builder

from paring.engine import Engine, _core
from paring.engine.graph import Activation, Linear

N, K = 48, 128


def windows(keep: int, width: int, random: np.random.Generator) -> np.ndarray:
    order = random.random((N, K // width, width)).argsort(axis=2)
    kept: np.ndarray = (order < keep).reshape(N, K)
    return kept


def blocks(rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """40 % of the blocks."""
    kept = random.random((N // rows, K // columns)) < 0.4
    return np.repeat(np.repeat(kept, rows, axis=0), columns, axis=1)


def keep(structure: str, random: np.random.Generator) -> np.ndarray:
    if ":" in structure:
        count, width = map(int, structure.split(":"))
        return windows(count, width, random)
    rows, columns = map(int, structure.split("x"))
    return blocks(rows, columns, random)


# Structure, its layout, and the bits a weight takes for masks or places.
CASES = [
    ("2:4", "i8_2of4", 1),
    ("4:16", "i8_4of16", 1),
    ("8:16", "i8_bitmask", 1),
    ("2x1", "i8_pairs", 1 / 2),
    ("16x1", "i8_columns", 1 / 16),
    ("1x4", "i8_block4", 1 / 4),
]


@pytest.mark.parametrize(("structure", "layout", "bits"), CASES)
def test_a_structure_gets_its_layout(structure: str, layout: str, bits: float) -> None:
    b = Builder(K, vocabulary=N)
    kept = keep(structure, b.random)
    values = np.where(kept, b.random.integers(-128, 128, (N, K)), 0).astype(np.int8)
    scales = 0.002 + 0.01 * b.random.random((N, 1))
    activation = Activation(bits=8, dynamic=True)
    b.matrix("w", values, scales, keep=kept, activation=activation)
    b.add(Linear(weight="w", input="x", out="y"))
    graph: Any = b.show("y", N)
    tokens = b.random.integers(0, N, 5).tolist()
    exact = reference_interpreter.logits(graph, tokens)
    found = Engine(graph, kernels="reference").logits(tokens)
    assert np.abs(found - exact).max() <= 1e-6 * np.abs(exact).max()
    # Where only bytes count, the layout is the structure's own.
    matrix = Engine(graph, kernels="reference").info()["matrices"]["w"]
    assert matrix["layout"] == layout
    panels = N // 16 * (64 + 64 + 2 * 64)  # scales, row sums, rounding up to lines
    assert matrix["bytes"] <= kept.sum() + bits * N * K / 8 + panels
    for row in _core.rows():
        assert np.array_equal(Engine(graph, kernels=row).logits(tokens), found), row
