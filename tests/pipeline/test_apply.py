"""`recipe apply` as a user types it, on a pico model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from paring import cli
from paring.errors import RecipeError
from paring.pipeline import apply, load_model
from paring.recipes import Recipe

RECIPE = """\
version: 1
model: {model}
args: {{sparsity: 0.5}}
stages:
  - name: pare
    run: oneshot
    data: {{dataset: {corpus}/train.txt, samples: 8, length: 32}}
    modifiers:
      - SparseGPT: {{sparsity: "${{sparsity}}", ignore: [lm_head]}}
      - Quantization: {{scheme: W8A8, ignore: [lm_head]}}
evaluate: {{dataset: {corpus}/test.txt, length: 32, windows: 4}}
"""
KILLER = """\
import os, signal
from paring import Modifier

class Killer(Modifier):
    def on_block(self, session, block):
        if block.index == 1 and "PARING_KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def recipe(pico: Path, corpus: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=pico, corpus=corpus))
    return file


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.application(), ["apply", *map(str, args)])


def test_a_recipe_from_the_command_line_to_its_report(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(recipe, "--output", output, "--set", "sparsity=0.75")
    assert result.exit_code == 0, result.output
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"}
    assert names >= {"graph", "report.json", "pruning_masks.npz", ".paring"}
    assert [path.name for path in (output / ".paring").iterdir()] == ["run.json"]
    report = json.loads((output / "report.json").read_text())
    assert report["after"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert report["before"]["sparsity"] == 0
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert all(report["speed"][name] > 0 for name in ("torch", "dense", "pared"))
    assert "tokens/s" in result.stdout
    assert "recipe generate" in result.stdout.splitlines()[-1]
    assert Recipe.load(output / "recipe.yaml").args == {"sparsity": 0.75}
    assert "${" not in (output / "recipe.yaml").read_text()


def test_perplexity_before_is_torchs_and_after_the_engines(recipe: Path, tmp_path: Path) -> None:
    result = apply(str(recipe), output=tmp_path / "out")
    memory = apply(str(recipe))
    assert result.report["evaluate"]["windows"] == 4
    before, after = result.report["before"]["perplexity"], result.report["after"]["perplexity"]
    assert before == memory.report["before"]["perplexity"]
    assert after == pytest.approx(memory.report["after"]["perplexity"], rel=5e-3)
    assert after != before
