"""benchmarks/patterns.py: which sparsity a pattern gets to be compared at equal bytes or equal speed."""

from __future__ import annotations

import importlib
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
    assert (sparsity < fixed) == (pattern == "1x4")  # a smaller index leaves more for weights


def test_equal_speed_is_interpolated_and_never_guessed(patterns):
    def row(pattern: str, sparsity: float, speed: float) -> dict[str, Any]:
        return {"pattern": pattern, "sparsity": sparsity, "dtype": "int8", "of_dense_int8": speed}

    speeds = [row("8:16", 0.5, 1.6), row("1x4", 0.6, 2.0), row("1x4", 0.4, 1.5)]
    assert patterns.at_speed("1x4", "8:16", "int8", speeds) == pytest.approx(0.44)
    assert patterns.at_speed("1x4", "8:16", "int4", speeds) is None
    assert patterns.at_speed("1x4", "4:16", "int8", speeds) is None
    assert patterns.at_speed("1x4", "8:16", "int8", [row("8:16", 0.5, 2.5), *speeds[1:]]) is None
    cases = patterns.wanted(speeds)
    assert cases["1x4", "int8", "8:16", "speed"].name == "1x4@0.44"
    assert ("1x4", "int8", "4:16", "speed") not in cases
    assert cases["2:4", "int4", "8:16", "bytes"].name == "2:4"
    assert ("2:4", "int4", "4:16", "bytes") not in cases


def test_the_table_has_what_was_measured_and_nothing_else(patterns):
    case = patterns.wanted([])["1x4", "int8", "8:16", "bytes"]
    measured = {"perplexity": 12.3, "read_bytes": 0.64, "file_bytes": 0.7}
    text = patterns.table([{"case": case.name, "dtype": "int8", **measured}], [])
    rows = [line for line in text.splitlines() if "12.3" in line]
    assert rows == ["| 8:16 | int8 | 1x4 | 40.6% | 12.30 | 0.640 (0.700) |"]
    assert text.count("1x4") == 1
