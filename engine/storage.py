"""How matrices are stored: int4 nibbles and bitmasks (docs/architecture.md, graph)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .graph import Matrix

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]

_POPULATION = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def pack_mask(mask: Bools) -> Bytes:
    """[n, k] -> u8 [n, ceil(k/8)], least significant bit first, padding bits 0."""
    return np.packbits(mask, axis=1, bitorder="little")


def unpack_mask(packed: Bytes, k: int) -> Bools:
    """u8 [n, ceil(k/8)] -> [n, k]."""
    return np.unpackbits(packed, axis=1, count=k, bitorder="little").view(np.bool_)


def row_counts(packed: Bytes) -> NDArray[np.int64]:
    """Kept weights of each row, padding bits included: u8 [n, ceil(k/8)] -> [n]."""
    counts: NDArray[np.int64] = _POPULATION[packed].sum(axis=1, dtype=np.int64)
    return counts


def padding_is_zero(packed: Bytes, k: int) -> bool:
    """Whether the bits of a mask past column k are 0."""
    return k % 8 == 0 or not (packed[:, -1] >> (k % 8)).any()


def pack_int4(values: NDArray[np.int8]) -> Bytes:
    """[n, k] in -8..7 -> u8 [n, ceil(k/2)], two's complement nibbles, low first."""
    n, k = values.shape
    nibbles = np.zeros((n, k + k % 2), np.uint8)
    nibbles[:, :k] = values.view(np.uint8) & 15
    return _joined(nibbles)


def unpack_int4(packed: Bytes, k: int) -> NDArray[np.int8]:
    """u8 [n, ceil(k/2)] -> int8 [n, k]."""
    return _signed(_nibbles(packed)[:, :k])


def _joined(nibbles: Bytes) -> Bytes:
    """u8 [..., 2 b] in 0..15 -> u8 [..., b], low nibble first."""
    packed: Bytes = nibbles[..., 0::2] | nibbles[..., 1::2] << np.uint8(4)
    return packed


def _nibbles(packed: Bytes) -> Bytes:
    """u8 [..., b] -> u8 [..., 2 b] in 0..15."""
    pairs: Bytes = np.stack([packed & 15, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _signed(nibbles: Bytes) -> NDArray[np.int8]:
    values: NDArray[np.int8] = (nibbles ^ 8).astype(np.int8) - np.int8(8)
    return values


def _nibble_slots(mask: Bools) -> tuple[NDArray[np.int64], int]:
    """Nibble index of each kept weight when every row starts on a byte, and the bytes in all."""
    counts = mask.sum(axis=1)
    row_bytes = (counts + 1) // 2
    # Row r is shifted by the padding nibbles of the rows before it.
    shift = 2 * (np.cumsum(row_bytes) - row_bytes) - (np.cumsum(counts) - counts)
    return np.arange(int(counts.sum())) + np.repeat(shift, counts), int(row_bytes.sum())


def pack_kept_int4(values: NDArray[np.int8], mask: Bools) -> Bytes:
    """The kept values of [n, k] as nibbles in row-major order, each row starting on a byte."""
    slots, size = _nibble_slots(mask)
    nibbles = np.zeros(2 * size, np.uint8)
    nibbles[slots] = values[mask].view(np.uint8) & 15
    return _joined(nibbles)


def unpack_kept_int4(packed: Bytes, mask: Bools) -> NDArray[np.int8]:
    """Inverse of `pack_kept_int4`: int8 [n, k], 0 where the mask is."""
    slots, _ = _nibble_slots(mask)
    dense = np.zeros(mask.shape, np.int8)
    dense[mask] = _signed(_nibbles(packed)[slots])
    return dense


def kept_int4_bytes(counts: NDArray[np.int64]) -> int:
    """Bytes of the values of an int4 matrix under a bitmask, from the kept weights of each row."""
    return int(((counts + 1) // 2).sum())


def bitmask_is_smaller(dtype: str, mask: Bools) -> bool:
    """Whether kept values and a mask take fewer bytes than the dense matrix."""
    n, k = int(mask.shape[0]), int(mask.shape[1])
    mask_bytes = n * -(-k // 8)
    if dtype == "i4":
        return kept_int4_bytes(mask.sum(axis=1)) + mask_bytes < n * -(-k // 2)
    size = {"f32": 4, "f16": 2, "i8": 1}[dtype]
    return int(mask.sum()) * size + mask_bytes < n * k * size


def pack(dtype: str, storage: str, values: Array, mask: Bools) -> dict[str, Array]:
    """Parts `values` and, for a bitmask, `mask`, of a dense [n, k] matrix (int8 for i8 and i4)."""
    if storage == "dense":
        return {"values": pack_int4(values) if dtype == "i4" else values}
    kept = pack_kept_int4(values, mask) if dtype == "i4" else values[mask]
    return {"values": kept, "mask": pack_mask(mask)}


def unpack(matrix: Matrix, parts: Mapping[str, Array]) -> Array:
    """Stored values as dense [n, k]: int8 for i8 and i4, else f32 or f16."""
    n, k = matrix.shape
    values = parts["values"]
    if matrix.storage == "dense":
        return unpack_int4(values, k) if matrix.dtype == "i4" else values
    mask = unpack_mask(parts["mask"], k)
    if matrix.dtype == "i4":
        return unpack_kept_int4(values, mask)
    dense = np.zeros((n, k), values.dtype)
    dense[mask] = values
    return dense


def dequantize(matrix: Matrix, parts: Mapping[str, Array]) -> NDArray[np.float32]:
    """The weights that a stored matrix stands for, f32 [n, k]: q * scale of the column's group."""
    weights = unpack(matrix, parts).astype(np.float32)
    if matrix.quantized:
        k = matrix.shape[1]
        scales = np.repeat(parts["scales"], matrix.group or k, axis=1)[:, :k]
        weights *= scales
    return weights
