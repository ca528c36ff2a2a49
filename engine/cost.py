"""What a matrix costs to decode: bytes read and cycles, by the model that the engine chooses layouts with.

The figures are those of cpp/kernels/choose.cpp and cpp/dispatch.cpp; tests/engine/test_cost.py packs matrices and
compares. For pruners, which must know the price of a pattern before there is a matrix to pack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

DType: TypeAlias = Literal["f32", "i8", "i4"]

BYTES_PER_CYCLE = 5.0  # what one core gets from memory when all cores read
HIDING = 3  # fetching and decoding together take the norm of this order of both: each hides most of the other

# Of layouts that cost the same, the first is chosen.
ORDER = [
    *("f32_dense", "f32_bitmask"),
    *(
        f"{dtype}_{kind}"
        for dtype in ("i8", "i4")
        for kind in (
            "dense",
            "4of16",
            "2of4",
            "n16",
            "columns",
            "pairs",
            "bitmask",
            "block4",
            "words",
            "lists",
            "lists4",
        )
    ),
]

# Cycles for 64 weights (lists: for a vector, 4 weights of each of 8 rows), measured in a core's L2 cache:
# AVX2 on Zen 3 (i8_block4 and i4_lists4 in memory, where they are slower than their 12.6 and 5.7 cycles and their
# bytes), avx512_vbmi2 on Zen 4, the others on Zen 5.
CYCLES: dict[str, dict[str, float]] = {
    "avx2": {
        "f32_dense": 15.0,
        "f32_bitmask": 40.0,
        "i8_dense": 3.9,
        "i4_dense": 3.7,
        "i8_bitmask": 18.8,
        "i4_bitmask": 24.2,
        "i8_block4": 15.5,
        "i4_block4": 17.1,
        "i8_2of4": 5.1,
        "i4_2of4": 4.7,
        "i8_4of16": 2.7,
        "i4_4of16": 2.4,
        "i8_n16": 17.4,
        "i4_n16": 15.8,
        "i8_pairs": 17.5,
        "i4_pairs": 21.1,
        "i8_columns": 13.4,
        "i4_columns": 14.7,
        "i8_lists": 4.7,
        "i4_lists": 5.5,
        "i8_lists4": 5.5,
        "i4_lists4": 8.5,
    },
    "avx512": {
        "f32_dense": 8.5,
        "f32_bitmask": 14.0,
        "i8_dense": 2.4,
        "i4_dense": 1.7,
        "i8_bitmask": 9.7,
        "i4_bitmask": 13.0,
        "i8_block4": 3.8,
        "i4_block4": 4.2,
        "i8_2of4": 2.1,
        "i4_2of4": 1.7,
        "i8_4of16": 1.2,
        "i4_4of16": 1.2,
        "i8_n16": 9.3,
        "i4_n16": 8.7,
        "i8_pairs": 8.6,
        "i4_pairs": 9.5,
        "i8_columns": 3.3,
        "i4_columns": 3.9,
    },
    "avx512_vnni": {
        "f32_dense": 8.5,
        "f32_bitmask": 14.0,
        "i8_dense": 1.5,
        "i4_dense": 1.4,
        "i8_bitmask": 7.2,
        "i4_bitmask": 12.0,
        "i8_block4": 2.9,
        "i4_block4": 3.6,
        "i8_2of4": 0.9,
        "i4_2of4": 1.2,
        "i8_4of16": 0.7,
        "i4_4of16": 1.0,
        "i8_n16": 6.6,
        "i4_n16": 7.4,
        "i8_pairs": 6.1,
        "i4_pairs": 8.5,
        "i8_columns": 3.2,
        "i4_columns": 3.7,
    },
    "avx512_vbmi2": {
        "f32_dense": 12.5,
        "f32_bitmask": 15.0,
        "i8_dense": 2.6,
        "i4_dense": 2.3,
        "i8_bitmask": 3.8,
        "i4_bitmask": 5.2,
        "i8_block4": 3.8,
        "i8_2of4": 2.0,
        "i4_2of4": 2.5,
        "i8_4of16": 1.4,
        "i4_4of16": 2.0,
        "i8_n16": 4.5,
        "i4_n16": 5.0,
        "i8_pairs": 4.6,
        "i4_pairs": 5.0,
        "i8_columns": 1.7,
        "i4_columns": 3.4,
        "i4_words": 3.1,
    },
}


@dataclass(frozen=True)
class Cost:
    """Of one weight, kept or not, on average."""

    layout: str
    bytes: float
    """Bytes that decoding a token reads for it."""
    cycles: float
    """Cycles until the next: those of memory and of decoding, which partly overlap. Only ratios mean much."""


def cost(
    dtype: DType,
    weights: float,
    blocks: float,
    kernels: str = "avx512_vbmi2",
    pattern: str = "unstructured",
    group: int = 0,
    by: Literal["cycles", "bytes"] = "cycles",
) -> Cost:
    """The cheapest layout of a matrix and its cost, without scales: by cycles, as the engine chooses it, or by bytes.

    weights: the fraction of weights kept; blocks: the fraction of 1x4 blocks with any kept; kernels: the kernel row;
    pattern: what else is known of the mask; group: columns that share a scale, 0 for a row. Rows that no pattern ties
    together are taken to be independent.
    """
    groups = 64 / group if group else 0.0
    vectors = {
        "lists": _vectors(weights, blocks, pattern),
        "lists4": _block_vectors(blocks, pattern),
    }
    sizes = _sizes(dtype, 64 * weights, 16 * blocks) | _even_sizes(dtype, weights, pattern, groups)
    if dtype != "f32":
        for kind, places in (("lists", 16), ("lists4", 4)):
            vector = places + 1 + (32 if dtype == "i8" else 16)
            sizes[f"{dtype}_{kind}"] = 0.25 * groups + vector * vectors[kind]
    found = []
    for layout in sorted(sizes.keys() & CYCLES[kernels].keys(), key=ORDER.index):
        size = sizes[layout]
        decoding = CYCLES[kernels][layout] * vectors.get(layout.split("_")[1], 1)
        fetching = (size + 2 * groups) / BYTES_PER_CYCLE  # with the scales of groups, in float16
        cycles = (fetching**HIDING + decoding**HIDING) ** (1 / HIDING)
        found.append(Cost(layout, size / 64, cycles / 64))
    return min(found, key=lambda one: one.cycles if by == "cycles" else one.bytes)


def scale_bytes(columns: int, group: int) -> float:
    """Bytes per weight of an integer matrix's scales and row sums, for scales as quantizers make them.

    Of a row: one f16 for each group, filled up to an even number, or one f32 if there is only one; and one f32 more.
    """
    groups = -(-columns // group) if group else 1
    scales = 4.0 if groups == 1 else 4.0 * -(-groups // 2)
    return (scales + 4.0) / columns


def _sizes(dtype: DType, weights: float, blocks: float) -> dict[str, float]:
    """Bytes of 64 weights by layout, of which so many weights and blocks are kept."""
    if dtype == "f32":
        return {"f32_dense": 256, "f32_bitmask": 8 + 4 * weights}
    if dtype == "i8":
        return {"i8_dense": 64, "i8_bitmask": 8 + weights, "i8_block4": 2 + 4 * blocks}
    sizes: dict[str, float] = {"i4_dense": 32, "i4_bitmask": 8.25 + weights / 2}
    return sizes | dict.fromkeys(("i4_block4", "i4_words"), 2 + 2 * blocks)


def _even_sizes(dtype: DType, weights: float, pattern: str, groups: float) -> dict[str, float]:
    """Bytes of 64 weights in the layouts of shared masks, and of windows if the pattern fills those evenly."""
    if dtype == "f32":
        return {}
    value = 64.0 if dtype == "i8" else 32.0  # of 64 weights
    pairs = weights if pattern in ("2x1", "16x1") else 1 - (1 - weights) ** 2
    rows = {"2x1": 8, "16x1": 1}.get(pattern, 16)  # independent ones of 16
    columns = 1 - (1 - weights) ** rows
    fill = (1.5 if dtype == "i8" else 3.5) * groups  # zero weights that end a group
    sizes = {
        f"{dtype}_pairs": 4 + value * pairs,
        f"{dtype}_columns": 0.75 + value * columns + value / 64 * fill,
    }
    if pattern == "2:4":
        sizes[f"{dtype}_2of4"] = 8 + value / 2
    if pattern == "4:16":
        sizes[f"{dtype}_4of16"] = 8 + value / 4
    if pattern in ("4:16", "8:16", "12:16", "n:16"):
        sizes[f"{dtype}_n16"] = 8.25 + value * weights
    return sizes


def _vectors(weights: float, blocks: float, pattern: str) -> float:
    """Vectors of 8 rows x 4 weights for 64 weights, in lists: what the fullest row of 16 columns needs.

    If blocks of 1x4 are kept or pruned together, as `blocks` tells, they are taken to be independent, else weights.
    """
    if pattern in ("2:4", "4:8", "4:16", "8:16", "12:16", "n:16"):
        return 2 * weights
    rows = {"2x1": 4, "16x1": 1}.get(pattern, 8)  # independent ones of 8
    of = 4 if blocks < 1.01 * weights else 16  # independent ones of 16 columns
    share = blocks if of == 4 else weights
    below = [_binomial_below(of, share, kept) ** rows for kept in range(of + 1)]
    step = of // 4
    return sum(1 - below[kept] for kept in range(0, of, step)) / 2


def _block_vectors(blocks: float, pattern: str) -> float:
    """The same in lists of 1x4 blocks: what the fullest row of 8 blocks needs, blocks taken to be independent."""
    rows = {"2x1": 4, "16x1": 1}.get(pattern, 8)  # independent ones of 8
    return sum(1 - _binomial_below(8, blocks, kept) ** rows for kept in range(8)) / 4


def _binomial_below(n: int, p: float, most: int) -> float:
    """The chance that at most so many of n are kept."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(most + 1))
