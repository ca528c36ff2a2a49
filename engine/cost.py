"""What a matrix costs to decode: bytes read and cycles, by the model that the engine chooses layouts with.

The figures are those of cpp/kernels/choose.cpp and cpp/dispatch.cpp; tests/engine/test_cost.py packs matrices and
compares. For pruners, which must know the price of a pattern before there is a matrix to pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

DType: TypeAlias = Literal["f32", "i8", "i4"]

BYTES_PER_CYCLE = 5.0  # what one core gets from memory when all cores read
CROWDING = 20.0  # bytes that cost a cycle even where cycles bind

# Cycles for 64 weights, measured on Zen 5 in its L2 cache.
CYCLES: dict[str, dict[str, float]] = {
    "avx2": {
        "f32_dense": 15.0,
        "f32_bitmask": 17.0,
        "i8_dense": 4.3,
        "i4_dense": 6.6,
        "i8_bitmask": 12.9,
        "i4_bitmask": 33.0,
        "i8_block4": 7.4,
        "i4_block4": 11.3,
    },
    "avx512_vnni": {
        "f32_dense": 8.5,
        "f32_bitmask": 14.0,
        "i8_dense": 1.7,
        "i4_dense": 1.6,
        "i8_bitmask": 13.8,
        "i4_bitmask": 27.0,
        "i8_block4": 3.3,
        "i4_block4": 4.2,
    },
    "avx512_vbmi2": {
        "f32_dense": 8.5,
        "f32_bitmask": 14.0,
        "i8_dense": 1.7,
        "i4_dense": 1.6,
        "i8_bitmask": 3.4,
        "i4_bitmask": 4.1,
        "i8_block4": 3.3,
        "i4_block4": 4.2,
    },
}


@dataclass(frozen=True)
class Cost:
    """Of one weight, kept or not, on average."""

    layout: str
    bytes: float
    """Bytes that decoding a token reads for it."""
    cycles: float
    """Cycles until the next: those of memory or of decoding, whichever binds. Only ratios mean much."""


def cost(dtype: DType, weights: float, blocks: float, kernels: str = "avx512_vbmi2") -> Cost:
    """The cheapest layout of a matrix and its cost, without scales.

    weights: the fraction of weights kept; blocks: the fraction of 1x4 blocks with any kept; kernels: the kernel row.
    """
    sizes = _sizes(dtype, 64 * weights, 16 * blocks)
    found = []
    for layout, size in sizes.items():
        cycles = max(size / BYTES_PER_CYCLE, CYCLES[kernels][layout]) + size / CROWDING
        found.append(Cost(layout, size / 64, cycles / 64))
    return min(found, key=lambda one: one.cycles)


def scale_bytes(columns: int, group: int) -> float:
    """Bytes per weight of an integer matrix's scales and row sums: one f32 for each group of a row, and one more."""
    groups = -(-columns // group) if group else 1
    return 4.0 * (groups + 1) / columns


def _sizes(dtype: DType, weights: float, blocks: float) -> dict[str, float]:
    """Bytes of 64 weights by layout, of which so many weights and blocks are kept."""
    if dtype == "f32":
        return {"f32_dense": 256, "f32_bitmask": 8 + 4 * weights}
    if dtype == "i8":
        return {"i8_dense": 64, "i8_bitmask": 8 + weights, "i8_block4": 2 + 4 * blocks}
    return {"i4_dense": 32, "i4_bitmask": 8.25 + weights / 2, "i4_block4": 2 + 2 * blocks}
