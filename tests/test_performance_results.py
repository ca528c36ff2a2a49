"""benchmarks/performance.py: what is run again, and what the page says of results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("performance", "performance_cases", "performance_report")


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def measured(modules, tmp_path) -> Any:
    """Results of two rounds: a case of Paring, its peer, and the bandwidth."""
    results = modules.performance.Results(tmp_path / "results.jsonl")
    key = {"part": "systems", "model": "SmolLM2-135M-Instruct"}
    answer = {"version": "1", "bytes_per_token": 10**8, "prefill": {"128": 500.0}}
    for turn, (ours, theirs, bandwidth) in enumerate([(100.0, 50.0, 2e10), (60.0, 40.0, 1e10)]):
        when = {"threads": 2, "round": turn}
        results.add(**key, **when, bandwidth=bandwidth)
        for case, speed in (("Paring dense int8", ours), ("llama.cpp Q8_0", theirs)):
            results.add(**key, **when, case=case, prompt=128, decode=speed, **answer)
    results.add(**key, case="OpenVINO int4", error="no such device")
    return results


def case(modules: Any, name: str) -> Any:
    return next(case for case in modules.performance_cases.SYSTEMS if case.name == name)


def test_only_what_this_machine_measured_is_not_run_again(modules, measured):
    ours, failed = case(modules, "Paring dense int8"), case(modules, "OpenVINO int4")
    again = modules.performance.Results(measured.file)
    assert ours.key(2, 1) in again.done()
    assert ours.key(2, 2) not in again.done()
    assert ours.key(1, 1) not in again.done()
    assert failed.key(2, 0) not in again.done()
    again.machine = "another CPU"
    assert again.done() == set()


def test_ratios_and_shares_are_of_one_round(modules, measured):
    results = modules.performance_report.Results(measured.rows)
    ours, theirs = case(modules, "Paring dense int8"), case(modules, "llama.cpp Q8_0")
    assert results.decode(ours, 2) == 80  # the ratio of the medians would be 80 / 45
    assert results.ratio(ours, theirs, 2) == pytest.approx((100 / 50 + 60 / 40) / 2)
    assert results.share(ours, 2) == pytest.approx((1e10 / 2e10 + 6e9 / 1e10) / 2)
    assert results.decode(ours, 1) is None


def test_the_page_has_what_was_measured_and_what_failed(modules, measured):
    text = modules.performance_report.page(measured.rows, None)
    assert "| Paring dense int8 | 80.0 | 500 |  | 100 | 55% | 1.75 x llama.cpp Q8_0 (1.9) |" in text
    assert "OpenVINO int4 did not run: no such device" in text
    assert "4:16" not in text
    assert "## 1.1B" not in text


def test_memory_and_batches_have_tables(modules, measured):
    key = {"model": "SmolLM2-135M-Instruct", "threads": 2, "round": 0}
    answer = {"version": "1", "bytes_per_token": 10**8, "prefill": {}, "load_seconds": 0.5}
    answer |= {"packed_bytes": 10**8, "cache_bytes_per_token": 10**4, "resident_bytes": 121 * 10**6}
    measured.add(**key, **answer, part="systems", case="Paring 8:16 int8", prompt=128, decode=90.0)
    for n, speed in ((1, 100.0), (8, 360.0)):
        name = f"Paring dense int8 *{n}"
        measured.add(**key, **answer, part="batch", case=name, prompt=16, decode=speed)
    text = modules.performance_report.page(measured.rows, None)
    assert "| Paring 8:16 int8 | 0.50 | 121 | 105 | 1.15 |" in text
    assert "| Paring dense int8 | 2 | 100 |  |  | 360 |  |  | 3.60 |" in text


def test_a_peer_without_an_interpreter_is_said_to_be_missing(modules, tmp_path):
    options = SimpleNamespace(peers=[], work=str(tmp_path / "work"), model=str(tmp_path))
    results = modules.performance.Results(tmp_path / "results.jsonl")
    runner = modules.performance.Runner(options, results)
    runner.prepare(case(modules, "torch FP32"))
    runner.measure(case(modules, "torch FP32"), 1, 0, 100.0)
    (line,) = results.file.read_text().splitlines()
    assert json.loads(line)["error"] == "no interpreter for torch was given"


def test_every_case_is_known_by_a_key_of_its_own(modules):
    cases = [case for part in modules.performance_cases.PARTS.values() for case in part]
    assert len({case.key(1, 0) for case in cases}) == len(cases) == len(set(cases))
    for found in cases:
        assert (BENCHMARKS / "peers" / found.script).is_file()


def test_a_run_while_the_cores_moved_apart_is_repeated(modules, tmp_path, monkeypatch):
    options = SimpleNamespace(
        peers=[], work=str(tmp_path / "work"), model=str(tmp_path), patience=60.0
    )
    results = modules.performance.Results(tmp_path / "results.jsonl")
    runner = modules.performance.Runner(options, results)
    speeds = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(
        runner, "_run", lambda *_: json.dumps({"decode": next(speeds), "prefill": {}})
    )
    trips = iter((100.0, 330.0, 330.0, 100.0, 110.0))  # before, after; twice before, after
    monkeypatch.setattr(modules.performance, "round_trip", lambda: next(trips))
    monkeypatch.setattr(modules.performance.time, "sleep", lambda _: None)
    runner.measure(case(modules, "torch FP32"), 2, 0, 100.0)
    assert [row["decode"] for row in results.rows] == [2.0]
    assert results.rows[0]["exchange"] == 110.0
