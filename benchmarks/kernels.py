"""GEMV speed of every layout against dense int8 and against the memory, in one run.

Each matrix is copied until the weights come from memory; the cases take turns, and medians over
the rounds are printed as a Markdown table.

    python benchmarks/kernels.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from paring.engine import _core

kernels: Any = _core.kernels


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    layout: str
    sparsity: float = 0.0
    group: int = 0
    mode: str = "int8_dynamic"
    pattern: str = "free"  # or "1x4", or "N:M"


CASES = [
    Case("dense int8", "i8_dense"),
    Case("dense fp32", "f32_dense", mode="f32"),
    Case("dense fp16", "f16_dense", mode="f32"),
    Case("dense int4 g64, 8-bit input", "i4_dense", group=64),
    Case("dense int4 g64, 15-bit input", "i4_dense", group=64, mode="int16"),
    Case("unstructured fp32 50 %", "f32_bitmask", 0.5, mode="f32"),
    *(Case(f"unstructured int8 {s} %", "i8_bitmask", s / 100) for s in (50, 60, 70, 80, 90)),
    *(Case(f"unstructured int4 g64 {s} %", "i4_bitmask", s / 100, 64) for s in (50, 70, 90)),
    Case("8:16 int8", "i8_bitmask", 0.5, pattern="8:16"),
    Case("4:16 int8", "i8_bitmask", 0.75, pattern="4:16"),
    *(Case(f"1x4 int8 {s} %", "i8_block4", s / 100, pattern="1x4") for s in (50, 70, 80, 90)),
    *(Case(f"1x4 int4 g64 {s} %", "i4_block4", s / 100, 64, pattern="1x4") for s in (50, 70)),
]


def kept_weights(case: Case, size: int, rng: np.random.Generator) -> np.ndarray:
    """Which of [size, size] weights a case keeps."""
    if case.pattern == "1x4":
        return np.repeat(rng.random((size, size // 4)) >= case.sparsity, 4, axis=1)
    if case.pattern == "free":
        return rng.random((size, size)) >= case.sparsity
    keep, window = map(int, case.pattern.split(":"))
    order = rng.random((size, size // window, window)).argsort(axis=2)
    kept: np.ndarray = (order < keep).reshape(size, size)
    return kept


def nibbles(weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Kept int4 weights, two a byte, each row starting on a byte."""
    rows = [row[mask] for row, mask in zip(weights, kept, strict=True)]
    even = [np.append(row, np.zeros(len(row) % 2, np.int8)).astype(np.uint8) & 15 for row in rows]
    flat = np.concatenate(even)
    packed: np.ndarray = flat[0::2] | flat[1::2] << 4
    return packed


def matrices(case: Case, size: int, megabytes: int) -> list[Any]:
    """Copies of one random matrix that together fill so many megabytes."""
    rng = np.random.default_rng(0)
    dtype = case.layout[: case.layout.index("_")]
    kept = kept_weights(case, size, rng)
    mask = None if case.layout.endswith("dense") else np.packbits(kept, axis=1, bitorder="little")
    if dtype.startswith("f"):
        weights = rng.standard_normal((size, size)).astype(f"f{int(dtype[1:]) // 8}")
        values, scales = weights[kept].view(np.uint8), None
    else:
        low = -(2 ** (int(dtype[1:]) - 1))
        weights = rng.integers(low, -low, (size, size)).astype(np.int8)
        values = nibbles(weights, kept) if dtype == "i4" else weights[kept].view(np.uint8)
        scales = np.full((size, -(-size // case.group) if case.group else 1), 0.01, np.float32)
    settings = {"group": case.group, "mode": case.mode, "layout": case.layout}
    found = [kernels.pack(size, size, dtype, values, mask, scales, **settings)]
    while found[0].bytes * len(found) < megabytes * 10**6:
        found.append(kernels.pack(size, size, dtype, values, mask, scales, **settings))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", default="auto", help="kernel row (default: the best)")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of a matrix")
    parser.add_argument("--megabytes", type=int, default=128, help="weights per case")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    sets = [matrices(case, options.size, options.megabytes) for case in CASES]
    probe_bytes = options.megabytes * 10**6
    times: list[list[float]] = [[] for _ in CASES]
    probe: list[float] = []
    for _ in range(options.rounds):
        probe += kernels.time_reading(probe_bytes, options.threads, 1)
        for found, seconds in zip(sets, times, strict=True):
            (took,) = kernels.time_linear(options.row, found, options.tokens, options.threads, 1)
            seconds.append(took / len(found))
    bandwidth = probe_bytes / statistics.median(probe)
    median = [statistics.median(seconds) for seconds in times]
    print(
        f"{options.threads} threads, {options.tokens} tokens, {options.size} x {options.size}, ",
        end="",
    )
    print(f"row {options.row}; reads {bandwidth / 1e9:.1f} GB/s")
    print(
        "| layout | bytes/weight | Gweights/s | x dense int8 | of the bandwidth |\n|---|---|---|---|---|"
    )
    weights = options.size**2
    for case, found, took in zip(CASES, sets, median, strict=True):
        size = found[0].bytes
        print(
            f"| {case.title} | {size / weights:.3f} | {weights / took / 1e9:.1f} | "
            f"{median[0] / took:.2f} | {size / took / bandwidth:.0%} |"
        )


if __name__ == "__main__":
    main()
