"""benchmarks/patterns.py: which sparsity a pattern gets to be compared at equal bytes or equal speed."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def patterns() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("patterns")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("level", ["8:16", "4:16"])
@pytest.mark.parametrize("pattern", ["unstructured", "2x1", "1x4", "n:16"])
def test_equal_bytes_are_equal(patterns, pattern, level, dtype):
    fixed = {"8:16": 0.5, "4:16": 0.75}[level]
    sparsity = patterns.at_bytes(pattern, level, dtype)
    ours = patterns.read_bytes(pattern, sparsity, dtype)
    assert ours == pytest.approx(patterns.read_bytes(level, fixed, dtype), abs=2e-3)
    if pattern in ("2x1", "1x4"):  # a smaller index leaves more for weights
        assert sparsity < fixed
    else:
        assert sparsity >= fixed - 1e-6


def speed(pattern: str, sparsity: float, of_dense_int8: float) -> dict[str, Any]:
    found = {"pattern": pattern, "sparsity": sparsity, "dtype": "int8"}
    return {**found, "of_dense_int8": of_dense_int8, "round": 0, "dense": False}


def accuracy(pattern: str, sparsity: float, perplexity: float) -> dict[str, Any]:
    case = pattern if ":" in pattern else f"{pattern}@{sparsity:g}"
    found = {"case": case, "pattern": pattern, "sparsity": sparsity, "dtype": "int8"}
    return {**found, "perplexity": perplexity, "file_bytes": 0.5}


SPEEDS = [speed("8:16", 0.5, 1.6), speed("1x4", 0.6, 2.0), speed("1x4", 0.4, 1.5)]


def test_equal_speed_is_interpolated_and_never_guessed(patterns):
    wanted = 1.6 * patterns.ALIKE
    expected = 0.4 + 0.2 * (wanted - 1.5) / 0.5
    assert patterns.at_speed("1x4", "8:16", "int8", SPEEDS) == pytest.approx(expected)
    assert patterns.at_speed("1x4", "8:16", "int4", SPEEDS) is None
    assert patterns.at_speed("1x4", "4:16", "int8", SPEEDS) is None
    faster = [speed("8:16", 0.5, 2.5), *SPEEDS[1:]]
    assert patterns.at_speed("1x4", "8:16", "int8", faster) == math.inf


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (2.5, "slower at 90%"),
        (1.6, "18.07 (43%)"),
        (1.99, "above 20.00 (58%)"),
        (1.2, "below 16.00 (21%)"),
    ],
)
def test_beside_the_grid_it_is_told_on_which_side(patterns, level, told):
    speeds = [speed("8:16", 0.5, level), speed("1x4", 0.1, 1.0), *SPEEDS[1:]]
    rows = [accuracy("1x4", 0.4, 16.0), accuracy("1x4", 0.45, 20.0)]
    assert patterns.cell("1x4", "8:16", "int8", "decode speed", rows, speeds) == told


def test_equal_speed_is_the_least_sparsity_that_has_it(patterns):
    """A layout that is not used below some sparsity leaves the speed where it was: dense."""
    flat = [speed("unstructured", 0.0, 1.0), speed("1x4", 0.5, 1.0), speed("1x4", 0.9, 3.0)]
    level = [speed("8:16", 0.5, 2.0), *flat]
    expected = 0.5 + 0.4 * (2.0 * patterns.ALIKE - 1) / 2
    assert patterns.at_speed("1x4", "8:16", "int8", level) == pytest.approx(expected)
    alike = [speed("8:16", 0.5, 1.01), *flat]
    assert patterns.at_speed("1x4", "8:16", "int8", alike) == 0.0
    cell = patterns.cell("1x4", "8:16", "int8", "decode speed", [], alike)
    assert cell == "dense is as fast"


def test_the_speed_of_a_graph_is_the_median_of_its_rounds(patterns):
    rounds = [speed("1x4", 0.6, each) for each in (2.0, 9.0, 1.9)] + [speed("2:4", 0.5, 1.4)]
    as_dense = {"pattern": "2x1", "sparsity": 0.5, "dtype": "int8", "round": None}
    rows = [*rounds, as_dense, speed("unstructured", 0.0, 1.01)]
    found = {row["pattern"]: row["of_dense_int8"] for row in patterns.medians(rows)}
    assert found == {"1x4": 2.0, "2:4": 1.4, "2x1": 1.01, "unstructured": 1.01}


def test_perplexity_lies_between_what_was_measured_or_is_not_told(patterns):
    rows = [accuracy("1x4", 0.4, 20.0), accuracy("1x4", 0.5, 45.0)]
    assert patterns.perplexity_at("1x4", 0.45, "int8", rows) == pytest.approx(30.0)
    assert patterns.perplexity_at("1x4", 0.5, "int8", rows) == pytest.approx(45.0)
    assert patterns.perplexity_at("1x4", 0.55, "int8", rows) is None
    assert patterns.perplexity_at("1x4", 0.45, "int4", rows) is None
    assert patterns.perplexity_at("2x1", 0.45, "int8", rows) is None


def test_the_table_has_what_was_measured_and_nothing_else(patterns):
    rows = [accuracy("8:16", 0.5, 36.5), accuracy("1x4", 0.4, 20.0), accuracy("1x4", 0.5, 45.0)]
    text = patterns.table(rows, SPEEDS)
    by_bytes, rest = text.split("### At equal decode speed")
    by_speed, measured = rest.split("### As measured")
    line = next(line for line in by_speed.splitlines() if line.startswith("| 8:16 | int8"))
    assert line.split("|")[3:-1] == [
        *("  ", "  ", " 24.94 (43%) ", "  ", "  ", "  ", " 36.50 (50%) ", "  ")
    ]
    assert "(41%)" in by_bytes  # 1x4 as large as 8:16
    assert "above 45.00 (66%)" in by_bytes  # as large as 4:16
    assert by_bytes.count("(") + by_speed.count("(") == 5
    assert "| 1x4 | 40% |  | 20.00 |  | 0.500 /  |" in measured


def test_a_fixed_pattern_tells_how_fast_it_is_beside_the_level(patterns):
    rows = [accuracy("8:16", 0.5, 36.5), accuracy("2:4", 0.5, 46.5)]
    speeds = [speed("8:16", 0.5, 1.6), speed("2:4", 0.5, 2.0)]

    def cell(kind: str, known: list[dict[str, Any]]) -> str:
        return str(patterns.cell("2:4", "8:16", "int8", kind, rows, known))

    assert cell("decode speed", speeds) == "46.50 (50%, 1.25 x as fast)"
    assert cell("decode speed", speeds[:1]) == ""
    assert cell("bytes per weight", []) == "46.50 (50%)"
