from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paring.engine import benchmark as module
from paring.engine.benchmark import Benchmark, Speed, benchmark
from paring.engine.export import export
from paring.errors import DataError, GraphError


def speed(decode: list[float], prefill: list[float]) -> Speed:
    return Speed(
        graph="g",
        kernels="reference",
        decode=decode,
        prefill=prefill,
        token_ms={"p50": 1.0, "p90": 2.0, "p99": 3.0},
        load_seconds=0.1,
        resident_bytes=1,
        packed_bytes=1,
        bytes_per_token=1,
        file_bytes=1,
        sparsity=0.5,
    )


def test_ratios_are_medians_of_pairs() -> None:
    """A machine that slows down over the run touches both of a pair, and so not their ratio."""
    found = Benchmark(
        speed=speed([30, 20, 10], [9, 9, 9]),
        baseline=speed([10, 10, 5], [1, 3, 9]),
        prompt=1,
        tokens=1,
        threads=1,
        machine="m",
    )
    assert found.decode_ratio == 2
    assert found.prefill_ratio == 3
    assert found.speed.decode_median == 20


def test_two_graphs_take_turns(
    quantized: Callable[..., Path], llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pared, dense = export(quantized("w8a8-sparse")), export(llama())
    turns: list[Path] = []
    timed = module._Run.round

    def spy(run: module._Run, *args: object, **options: object) -> tuple[float, float]:
        turns.append(run.path)
        return timed(run, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Run, "round", spy)
    calls: list[tuple[str, int, int]] = []
    found = benchmark(
        pared,
        dense,
        prompt=6,
        tokens=5,
        threads=1,
        rounds=3,
        progress=lambda *call: calls.append(call[:3]),
    )
    assert turns == [pared, dense] * 4  # one warm-up each, then three rounds
    assert calls == [("benchmark", i, 3) for i in (1, 2, 3)]
    assert found.baseline is not None
    for one in (found.speed, found.baseline):
        assert len(one.decode) == len(one.prefill) == 3
        assert min(one.decode + one.prefill) > 0
        assert one.token_ms["p50"] <= one.token_ms["p90"] <= one.token_ms["p99"]
        # Steps and rounds are the same time, told twice.
        assert 1000 / one.token_ms["p99"] <= max(one.decode)
        assert one.load_seconds > 0
    assert found.speed.sparsity > found.baseline.sparsity
    assert found.speed.bytes_per_token < found.baseline.bytes_per_token
    assert found.speed.file_bytes == (pared / "graph.safetensors").stat().st_size
    assert (found.threads, found.prompt, found.tokens) == (1, 6, 5)


def test_result_is_json_with_ratios(llama: Callable[..., Path]) -> None:
    graph = export(llama())
    alone = json.loads(json.dumps(benchmark(graph, prompt=3, tokens=2, rounds=1).to_json()))
    assert (alone["baseline"], alone["decode_ratio"]) == (None, None)
    assert alone["speed"]["decode_median"] == alone["speed"]["decode"][0]
    both = benchmark(graph, graph, prompt=3, tokens=2, rounds=1).to_json()
    assert both["decode_ratio"] == both["speed"]["decode"][0] / both["baseline"]["decode"][0]


def test_sequences_are_decoded_together(llama: Callable[..., Path]) -> None:
    graph = export(llama())
    found = benchmark(graph, graph, prompt=3, tokens=4, rounds=2, sequences=5)
    assert found.sequences == 5
    assert found.baseline is not None
    for one in (found.speed, found.baseline):
        assert len(one.together) == 2
        assert one.together_ratio == np.median(np.array(one.together) / np.array(one.decode))
    assert found.to_json()["speed"]["together_median"] == found.speed.together_median
    alone = benchmark(graph, prompt=3, tokens=2, rounds=1)
    assert (alone.speed.together, alone.speed.together_ratio) == ([], None)


def test_resident_bytes_see_memory() -> None:
    before = module.resident_bytes()
    held = np.ones(50_000_000 // 8)
    assert 40e6 < module.resident_bytes() - before < 80e6
    del held


def test_bad_requests(llama: Callable[..., Path]) -> None:
    graph = export(llama())  # a context of 128
    with pytest.raises(DataError, match="context is 128"):
        benchmark(graph, prompt=100, tokens=29)
    with pytest.raises(DataError, match="at least 1"):
        benchmark(graph, rounds=0)
    with pytest.raises(DataError, match="at least 1"):
        benchmark(graph, sequences=0)
    with pytest.raises(GraphError):
        benchmark(graph, graph / "nothing")
