from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from paring.cli import application
from paring.errors import RecipeError
from paring.modifiers import base

BAD = """version: 1
modle: zoo:smollm2-135m-instruct
args: {sparsity: 0.5}
stages:
  - run: oneshto
    modifiers:
      - SparseGTP: {sparsity: 0.5}
      - SparseGPT: {sparsity: ${sparsty}}
      - SparseGPT: {sparsity: 1.5, mask_structure: 2:4}
"""


def recipe(*args: str) -> Result:
    return CliRunner().invoke(application(), list(args))


def test_five_mistakes_are_five_lines_and_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    command = [sys.executable, "-m", "paring", "validate", "bad.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    *located, summary = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in located] == [
        "bad.yaml:2:1",
        "bad.yaml:5:10",
        "bad.yaml:7:9",
        "bad.yaml:8:31",
        "bad.yaml:9:31",
    ]
    assert summary == "✗ bad.yaml: 5 mistakes"


def test_a_place_is_printed_as_it_is(tmp_path: Path) -> None:
    """rich takes `:100:` for an emoji unless told otherwise."""
    file = tmp_path / "bad.yaml"
    file.write_text("\n" * 99 + "stages: []\n")
    done = recipe("validate", str(file))
    assert done.stderr.splitlines()[0].endswith(
        "bad.yaml:100:9: a recipe without stages does nothing; add one"
    )


def test_validate_says_what_a_good_recipe_does() -> None:
    done = recipe("validate", "smollm2-w8a8", "smollm2-sparse50-finetune")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "✓ smollm2-w8a8: quantize (oneshot): Quantization",
        "✓ smollm2-sparse50-finetune: prune (oneshot): ADMMPruning; "
        "finetune (train): ConstantPruning, SquareHead, Distillation",
    ]


def test_validate_takes_overrides_and_own_modifiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    done = recipe("validate", "smollm2-sparse50-w8a8", "--set", "sparsity=2")
    assert done.exit_code == 2
    assert "sparsity is too large, got 2.0" in done.stderr
    (tmp_path / "mine.py").write_text(
        "from paring import Modifier\n\n\nclass ClipForTest(Modifier):\n    limit: float\n"
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("stages: [{run: oneshot, modifiers: [ClipForTest: {limit: 3.0}]}]")
    assert "unknown modifier 'ClipForTest'" in recipe("validate", str(mine)).stderr
    done = recipe("validate", str(mine), "--use", str(tmp_path / "mine.py"))
    assert done.exit_code == 0, done.stderr
    assert isinstance(recipe("validate", str(mine), "--set", "limit").exception, RecipeError)


def test_list_and_show_need_no_torch() -> None:
    script = (
        "import sys; from paring.cli import application\n"
        "try: application()(sys.argv[1:], prog_name='recipe')\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in (["list"], ["show", "smollm2-w8a8"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "SmolLM2-135M in int8: weights and activations" in done.stdout


def test_list_is_a_line_for_each_recipe_and_searches() -> None:
    lines = recipe("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe("list", "--names").stdout.split()
    assert recipe("list", "--names", "CUBIC").stdout.split() == ["smollm2-gradual-magnitude60"]
    assert "No recipe has zzz" in recipe("list", "zzz").stdout


def test_show_prints_the_file_or_what_it_resolves_to() -> None:
    shown = recipe("show", "smollm2-sparse50-w8a8").stdout
    assert "sparsity: ${sparsity}" in shown
    assert shown.startswith("# SmolLM2-135M")
    resolved = recipe("show", "smollm2-sparse50-w8a8", "--set", "sparsity=0.75").stdout
    assert "SparseGPT: \n" not in resolved
    assert "sparsity: 0.75" in resolved
    assert "${" not in resolved


def test_copy_makes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe("copy", "smollm2-w8a8").exit_code == 0
    copied = tmp_path / "smollm2-w8a8.yaml"
    assert copied.read_text() + "" == recipe("show", "smollm2-w8a8").stdout
    copied.write_text("mine")
    again = recipe("copy", "smollm2-w8a8")
    assert isinstance(again.exception, RecipeError)
    assert copied.read_text() == "mine"
    assert recipe("copy", "smollm2-w8a8", "--force").exit_code == 0
    assert copied.read_text() != "mine"
    assert recipe("copy", "smollm2-w8a8", "other.yaml").exit_code == 0
    assert isinstance(recipe("copy", "smollm2-w8a8", "no/x.yaml").exception, RecipeError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.yaml", "smollm2-w8a8.yaml"]


def test_schema_is_json(tmp_path: Path) -> None:
    printed = json.loads(recipe("schema").stdout)
    file = tmp_path / "s.json"
    assert recipe("schema", "--output", str(file)).exit_code == 0
    assert json.loads(file.read_text()) == printed
    assert "SparseGPT" in json.dumps(printed)
