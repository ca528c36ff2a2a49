"""The price list for pruners against what the engine really packs."""

from __future__ import annotations

import numpy as np
import pytest

from paring.engine import _core
from paring.engine.cost import CYCLES, cost, scale_bytes

# All that were compiled: packing asks nothing of the CPU.
KERNELS = [row for row in CYCLES if row in dict(_core.kernels.rows())]


def packed(dtype: str, kept: np.ndarray, group: int, row: str):
    """The matrix as the engine packs it, in the layout it chooses."""
    rows, columns = kept.shape
    rng = np.random.default_rng(0)
    if dtype == "f32":
        values, scales, mode = (
            rng.standard_normal(kept.shape).astype("f4")[kept].view("u1"),
            None,
            "f32",
        )
    else:
        scales = np.ones((rows, -(-columns // group) if group else 1), np.float32)
        counts = kept.sum(axis=1)
        size = int(kept.sum()) if dtype == "i8" else int(((counts + 1) // 2).sum())
        values, mode = np.zeros(size, np.uint8), "int8_dynamic"
    mask = np.packbits(kept, axis=1, bitorder="little")
    settings = {"group": group, "mode": mode, "row": row}
    return _core.kernels.pack(rows, columns, dtype, values, mask, scales, **settings)


@pytest.mark.parametrize("row", KERNELS)
@pytest.mark.parametrize(("dtype", "group"), [("f32", 0), ("i8", 0), ("i8", 64), ("i4", 64)])
@pytest.mark.parametrize("pattern", ["free", "1x4"])
def test_layout_and_bytes_are_those_of_the_engine(row, dtype, group, pattern):
    rng = np.random.default_rng(1)
    for sparsity in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        if pattern == "1x4":
            kept = np.repeat(rng.random((64, 128)) >= sparsity, 4, axis=1)
        else:
            kept = rng.random((64, 512)) >= sparsity
        matrix = packed(dtype, kept, group, row)
        blocks = kept.reshape(64, 128, 4).any(axis=2).mean()
        price = cost(dtype, kept.mean(), blocks, row, group=group)
        assert price.layout == matrix.layout, sparsity
        scales = scale_bytes(512, group) if dtype != "f32" else 0.0
        # panels are padded to 64 bytes, and a nibble may stand alone
        assert matrix.bytes / kept.size == pytest.approx(price.bytes + scales, rel=0.03, abs=0.01)


@pytest.mark.parametrize("row", KERNELS)
@pytest.mark.parametrize(("dtype", "group"), [("i8", 0), ("i4", 64)])
@pytest.mark.parametrize("pattern", ["2:4", "4:16", "8:16", "2x1", "16x1"])
def test_a_pattern_is_priced_as_the_engine_packs_it(row, dtype, group, pattern):
    rng = np.random.default_rng(2)
    if ":" in pattern:
        count, width = map(int, pattern.split(":"))
        order = rng.random((256, 512 // width, width)).argsort(axis=2)
        kept = (order < count).reshape(256, 512)
    else:
        rows = int(pattern.split("x")[0])
        kept = np.repeat(rng.random((256 // rows, 512)) < 0.3, rows, axis=0)
    matrix = packed(dtype, kept, group, row)
    blocks = kept.reshape(256, 128, 4).any(axis=2).mean()
    price = cost(dtype, kept.mean(), blocks, row, pattern, group)
    assert price.layout == matrix.layout
    scales = scale_bytes(512, group)
    assert matrix.bytes / kept.size == pytest.approx(price.bytes + scales, rel=0.04, abs=0.015)


@pytest.mark.parametrize("dtype", ["i8", "i4"])
def test_free_masks_are_fast_with_every_row(dtype):
    """By the model that chooses, zeros pay everywhere from 90 % on; at 80 % int4 with AVX2 is as fast as dense int4."""
    group = 64 if dtype == "i4" else 0
    for row in KERNELS:
        dense = cost(dtype, 1.0, 1.0, row, group=group)
        for kept in (0.2, 0.1):
            sparse = cost(dtype, kept, 1 - (1 - kept) ** 4, row, group=group)
            tie = (dtype, row, kept) == ("i4", "avx2", 0.2)
            assert sparse.cycles < dense.cycles or (tie and sparse.layout == dense.layout)


def test_the_newest_row_of_this_machine_is_priced():
    assert set(_core.rows()) - {"reference"} <= set(CYCLES)
