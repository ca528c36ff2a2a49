"""The rows of other machines, under emulation, and all rows under the sanitizers: minutes, so only when asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def load(name: str) -> Any:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


kernel_rows = load("kernel_rows")


@pytest.mark.skipif(
    "PARING_SLOW_TESTS" not in os.environ, reason="set PARING_SLOW_TESTS=1 (make test-elsewhere)"
)
@pytest.mark.parametrize("name", ["arm", "sanitize"])
def test_every_row_agrees_with_reference_elsewhere(name: str) -> None:
    lacking = kernel_rows.missing(name)
    if lacking:
        pytest.skip(lacking)
    done = kernel_rows.run(name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runs" in done.stdout
    found = kernel_rows.digests(name)
    assert len(found) >= 2
    assert len(set(found.values())) == 1, found


@pytest.mark.skipif(
    "PARING_SLOW_TESTS" not in os.environ, reason="set PARING_SLOW_TESTS=1 (make test-elsewhere)"
)
def test_the_engine_under_sanitizers() -> None:
    lacking = kernel_rows.missing("sanitize")
    if lacking:
        pytest.skip(lacking)
    done = load("sanitized_core").run(["tests/engine"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "core: " in done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(("target", "threads", "jobs"), [("here", 3, 100_000), ("race", 4, 20_000)])
def test_the_pool_runs_every_unit_once(target: str, threads: int, jobs: int) -> None:
    if target == "race" and "PARING_SLOW_TESTS" not in os.environ:
        pytest.skip("set PARING_SLOW_TESTS=1 (make test-elsewhere)")
    if kernel_rows.missing(target):
        pytest.skip(kernel_rows.missing(target))
    program = str(kernel_rows.build(target, "pool_stress"))
    done = subprocess.run([program, str(threads), str(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_source_belongs_to_its_longest_set() -> None:
    found = kernel_rows.instruction_set
    assert found(Path("dense_neon.cpp")) == "neon"
    assert found(Path("dense_neon_dotprod.cpp")) == "neon_dotprod"
    assert found(Path("dense_avx512_vnni.cpp")) == "avx512_vnni"
    assert found(Path("pack.cpp")) is None
