"""GEMV speed of every layout against dense int8 and against the memory, in one run.

Each matrix is copied until the weights come from memory; the cases take turns, and medians of what
each round showed are printed as a Markdown table: a ratio compares times of one round.

    python benchmarks/kernels.py --threads 2
    python benchmarks/kernels.py --threads 1 --rows 512 --columns 576 --megabytes 0 --clock 3.7  # in cache
    python benchmarks/kernels.py --row avx2 --only int4
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
    pattern: str = "free"  # or "1x4", "2x1", "16x1", "N:M", "n:16"


def windows(pattern: str, dtype: str, group: int, mode: str = "int8_dynamic") -> Case:
    """N kept of every M columns, in the layout made for it; n:16 is a quarter each of 4, 8, 8, 12."""
    layout = {"2:4": "2of4", "4:16": "4of16"}.get(pattern, "n16")
    title = f"{pattern} {dtype.replace('i', 'int')}" + (f" g{group}" if group else "")
    title += ", 15-bit input" if mode == "int16" else ""
    return Case(title, f"{dtype}_{layout}", group=group, mode=mode, pattern=pattern)


CASES = [
    Case("dense int8", "i8_dense"),
    Case("dense fp32", "f32_dense", mode="f32"),
    Case("dense fp16", "f16_dense", mode="f32"),
    Case("dense int4 g64, 8-bit input", "i4_dense", group=64),
    Case("dense int4 g64, 15-bit input", "i4_dense", group=64, mode="int16"),
    Case("unstructured fp32 50 %", "f32_bitmask", 0.5, mode="f32"),
    *(Case(f"unstructured int8 {s} %", "i8_bitmask", s / 100) for s in (50, 60, 70, 80, 90)),
    *(Case(f"unstructured int4 g64 {s} %", "i4_bitmask", s / 100, 64) for s in (50, 70, 90)),
    *(Case(f"unstructured int8 {s} %, lists", "i8_lists", s / 100) for s in (60, 70, 80, 90)),
    *(Case(f"unstructured int4 g64 {s} %, lists", "i4_lists", s / 100, 64) for s in (70, 80, 90)),
    Case("8:16 int8, lists", "i8_lists", pattern="8:16"),
    Case("8:16 int4 g64, lists", "i4_lists", group=64, pattern="8:16"),
    Case("8:16 int8, bitmask", "i8_bitmask", pattern="8:16"),
    Case("8:16 int4 g64, bitmask", "i4_bitmask", group=64, pattern="8:16"),
    *(windows(p, "i8", 0) for p in ("2:4", "4:16", "8:16", "n:16")),
    *(windows(p, "i4", 64) for p in ("2:4", "4:16", "8:16", "n:16")),
    *(windows(p, "i4", 64, "int16") for p in ("2:4", "4:16", "8:16", "n:16")),
    *(Case(f"2x1 int8 {s} %", "i8_pairs", s / 100, pattern="2x1") for s in (50, 60, 70, 80)),
    *(
        Case(f"2x1 int4 g64 {s} %", "i4_pairs", s / 100, 64, pattern="2x1")
        for s in (50, 60, 70, 80)
    ),
    *(Case(f"16x1 int8 {s} %", "i8_columns", s / 100, pattern="16x1") for s in (50, 70, 80, 90)),
    *(
        Case(f"16x1 int4 g64 {s} %", "i4_columns", s / 100, 64, pattern="16x1")
        for s in (50, 70, 90)
    ),
    *(Case(f"1x4 int8 {s} %", "i8_block4", s / 100, pattern="1x4") for s in (50, 70, 80, 90)),
    *(Case(f"1x4 int4 g64 {s} %", "i4_block4", s / 100, 64, pattern="1x4") for s in (50, 70)),
    *(
        Case(f"1x4 int4 g64 {s} %, words", "i4_words", s / 100, 64, pattern="1x4")
        for s in (50, 70, 80, 90)
    ),
    Case("1x4 int4 g64 70 %, words, 15-bit input", "i4_words", 0.7, 64, "int16", "1x4"),
    *(
        Case(f"1x4 int8 {s} %, lists", "i8_lists4", s / 100, pattern="1x4")
        for s in (50, 70, 80, 90)
    ),
    *(
        Case(f"1x4 int4 g64 {s} %, lists", "i4_lists4", s / 100, 64, pattern="1x4")
        for s in (50, 70, 80, 90)
    ),
]


def kept_weights(case: Case, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Which of [n, k] weights a case keeps."""
    if ":" not in case.pattern:
        rows, columns = map(int, {"free": "1x1"}.get(case.pattern, case.pattern).split("x"))
        blocks = rng.random((-(-n // rows), -(-k // columns))) >= case.sparsity
        return np.repeat(np.repeat(blocks, rows, axis=0), columns, axis=1)[:n, :k]
    keep, window = case.pattern.split(":")
    order = rng.random((n, -(-k // int(window)), int(window))).argsort(axis=2)
    count: Any = int(keep) if keep != "n" else 0
    if keep == "n":
        tiles = rng.choice([4, 8, 8, 12], (-(-n // 16), order.shape[1]))
        count = np.repeat(tiles, 16, axis=0)[:n, :, None]
    kept: np.ndarray = (order < count).reshape(n, -1)[:, :k]
    return kept


def nibbles(weights: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Kept int4 weights, two a byte, each row starting on a byte."""
    rows = [row[mask] for row, mask in zip(weights, kept, strict=True)]
    even = [np.append(row, np.zeros(len(row) % 2, np.int8)).astype(np.uint8) & 15 for row in rows]
    flat = np.concatenate(even)
    packed: np.ndarray = flat[0::2] | flat[1::2] << 4
    return packed


def matrices(case: Case, n: int, k: int, megabytes: int) -> list[Any]:
    """Copies of one random matrix that together fill so many megabytes, or one 20 times for none."""
    rng = np.random.default_rng(0)
    dtype = case.layout[: case.layout.index("_")]
    kept = kept_weights(case, n, k, rng)
    mask = None if case.layout.endswith("dense") else np.packbits(kept, axis=1, bitorder="little")
    if dtype.startswith("f"):
        weights = rng.standard_normal((n, k)).astype(f"f{int(dtype[1:]) // 8}")
        values, scales = weights[kept].view(np.uint8), None
    else:
        low = -(2 ** (int(dtype[1:]) - 1))
        weights = rng.integers(low, -low, (n, k)).astype(np.int8)
        values = nibbles(weights, kept) if dtype == "i4" else weights[kept].view(np.uint8)
        # Exact in float16, as a quantizer makes those of groups.
        scales = np.full((n, -(-k // case.group) if case.group else 1), 2**-7, np.float32)
    settings = {"group": case.group, "mode": case.mode, "layout": case.layout}
    found = [kernels.pack(n, k, dtype, values, mask, scales, **settings)]
    if megabytes == 0:
        return found * 20
    while found[0].bytes * len(found) < megabytes * 10**6:
        found.append(kernels.pack(n, k, dtype, values, mask, scales, **settings))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", default="auto", help="kernel row (default: the best)")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2048, help="of a matrix")
    parser.add_argument("--columns", type=int, default=2048, help="of a matrix")
    parser.add_argument(
        "--only", default="", help="cases with this in their title, besides dense int8"
    )
    parser.add_argument("--clock", type=float, help="GHz, to print cycles per 64 weights of a core")
    parser.add_argument(
        "--megabytes", type=int, default=128, help="weights per case; 0: one, again and again"
    )
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    cases = [CASES[0], *(case for case in CASES[1:] if options.only in case.title)]
    cases = [case for case in cases if case.layout in kernels.layouts(options.row)]
    sets = [matrices(case, options.rows, options.columns, options.megabytes) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    probe_bytes = max(options.megabytes * 10**6, sets[0][0].bytes)
    reading: list[float] = []  # bytes per second of each round
    for _ in range(options.rounds):
        # The first pass still writes back what filling the memory left in the caches.
        took = min(kernels.time_reading(probe_bytes, options.threads, 3)[1:])
        reading.append(probe_bytes / took)
        for found, seconds in zip(sets, times, strict=True):
            (took,) = kernels.time_linear(options.row, found, options.tokens, options.threads, 1)
            seconds.append(took / len(found))
    print(
        f"{options.threads} threads, {options.tokens} tokens, {options.rows} x {options.columns}, "
        f"row {options.row}, {options.rounds} rounds; reads {statistics.median(reading) / 1e9:.1f} GB/s"
    )
    table(options, cases, [found[0].bytes for found in sets], times, reading)


def table(
    options: argparse.Namespace,
    cases: list[Case],
    sizes: list[int],
    times: list[list[float]],
    reading: list[float],
) -> None:
    """Prints medians over the rounds; ratios are of times within a round."""
    columns = ["layout", "bytes/weight", "Gweights/s", "x dense int8", "of the bandwidth"]
    columns += ["cycles per 64"] if options.clock else []
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    weights = options.rows * options.columns
    for case, size, seconds in zip(cases, sizes, times, strict=True):
        took = statistics.median(seconds)
        ratio = statistics.median(d / s for d, s in zip(times[0], seconds, strict=True))
        share = statistics.median(size / s / r for s, r in zip(seconds, reading, strict=True))
        row = [case.title, f"{size / weights:.3f}", f"{weights / took / 1e9:.1f}"]
        row += [f"{ratio:.2f}", f"{share:.0%}"]
        if options.clock:
            row.append(f"{took * options.threads * options.clock * 1e9 / weights * 64:.2f}")
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
