"""`recipe export`, `recipe eval` and `recipe bench` on a pico model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pico_checkpoints import SCHEMES, quantize, write_llama
from typer.testing import CliRunner

from paring.cli import application
from paring.engine.export import export
from paring.engine.graph_file import read_graph
from paring.errors import ModelError, ParingError


def recipe(*arguments: object) -> str:
    """Stdout of a command that must succeed; a ParingError comes through as it is."""
    done = CliRunner().invoke(application(), [str(argument) for argument in arguments])
    if done.exception is not None and isinstance(done.exception, ParingError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse W8A8 with its graph; the context holds a window of the protocol."""
    folder = write_llama(tmp_path_factory.mktemp("m") / "pared", max_position_embeddings=1024)
    quantize(folder, **SCHEMES["w8a8-sparse"])
    export(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "bees.txt"
    path.write_text("".join(f"bee number {i} dances; " for i in range(200)))
    return path


def test_export(checkpoint: Path, tmp_path: Path) -> None:
    shown = recipe("export", checkpoint, "--output", tmp_path / "g", "--head", "f16")
    assert "tensors" in shown
    assert "lm_head.weight" in read_graph(tmp_path / "g").tensors
    with pytest.raises(ParingError, match="no such folder"):
        recipe("export", tmp_path / "nothing")


def test_eval_agrees_between_engine_and_torch(checkpoint: Path, text: Path) -> None:
    found: dict[str, Any] = {}
    for backend in ("engine", "torch"):
        options = ("--backend", backend, "--windows", 2, "--threads", 1, "--json")
        found[backend] = json.loads(recipe("eval", checkpoint, "--data", text, *options))
        assert (found[backend]["windows"], found[backend]["tokens"]) == (2, 1022)
        assert found[backend]["backend"] == backend
    assert found["engine"]["perplexity"] == pytest.approx(found["torch"]["perplexity"], rel=5e-3)
    shown = recipe("eval", checkpoint / "graph", "--data", text, "--windows", 1)
    assert "511 tokens of 1 windows (engine)" in " ".join(shown.split())


def test_eval_of_answers_agrees_between_engine_and_torch(checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{i}?", "answer": f"{i} bees"}) for i in range(4)]
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(lines))
    values = [
        json.loads(
            recipe("eval", checkpoint, "--data", data, "--backend", b, "--windows", 4, "--json")
        )["perplexity"]
        for b in ("engine", "torch")
    ]
    assert math.isfinite(values[0])
    assert values[0] == pytest.approx(values[1], rel=2e-2)


def test_bench_against_the_model_the_recipe_began_with(
    checkpoint: Path, llama: Callable[..., Path]
) -> None:
    options = ("--prompt", 4, "--tokens", 3, "--rounds", 1, "--threads", 1)
    with pytest.raises(ModelError, match=r"report\.json"):
        recipe("bench", checkpoint, "--against", "dense", *options)
    (checkpoint / "report.json").write_text(json.dumps({"model": str(llama())}))
    found = json.loads(recipe("bench", checkpoint, "--against", "dense", "--json", *options))
    assert found["decode_ratio"] > 0
    assert found["speed"]["sparsity"] > 0.2 > found["baseline"]["sparsity"]
    shown = recipe("bench", checkpoint / "graph", "--against", "dense", *options)
    for part in ("decode 3 tokens", "dense FP32", "ratio", "read per token", "p99"):
        assert part in shown
    alone = recipe("bench", checkpoint, *options)
    assert "ratio" not in alone
    assert "together" not in alone
    assert "3 sequences together" in recipe("bench", checkpoint, "--sequences", "3", *options)
