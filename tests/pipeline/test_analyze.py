"""`recipe analyze` on a pico model: table, files, picture, and the line to paste."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from paring.cli import application
from paring.errors import DataError, ModelError, ParingError, RecipeError, TargetError
from paring.modifiers.analysis.layers import layer_costs, short_names
from paring.modifiers.quantization.schemes import preset
from paring.recipes import Recipe

DOWN = "model.layers.1.mlp.down_proj"


def analyze(*arguments: object) -> Result:
    done = CliRunner().invoke(
        application(), ["analyze", *map(str, arguments)], env={"COLUMNS": "80"}
    )
    if isinstance(done.exception, ParingError):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def outlier(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model with one channel of one down_proj's input far above the others."""
    folder = tmp_path_factory.mktemp("outlier")
    for file in pico.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(pico)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[5] *= 3000
    model.get_submodule(DOWN).weight.data[:, 5] /= 3000
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def data(corpus: Path) -> tuple[object, ...]:
    return ("--data", corpus / "train.txt", "--samples", 4, "--length", 32)


@pytest.mark.parametrize("by", ["output_error", "noise", "input_range"])
def test_the_planted_layer_comes_first_and_the_line_to_paste_is_a_recipe(outlier, data, by):
    done = analyze(outlier, *data, "--static", "--by", by, "--top", 3)
    assert done.exit_code == 0, done.output
    first, second, *_ = [line for line in done.stdout.splitlines() if "█" in line]
    assert " 1.mlp.down_proj " in first
    assert first.count("█") == 12  # nothing is cut off at 80 characters
    assert first.count("█") > second.count("█")
    lines = re.findall(r"^ *(skip: \{.*?\})", done.stdout, re.MULTILINE)
    assert lines[0] == f"skip: {{by: {by}, top: 3}}"
    for line in lines:
        text = f"stages: [{{run: oneshot, modifiers: [Quantization: {{dynamic: false, {line}}}]}}]"
        (modifier,) = Recipe.parse(f"version: 1\n{text}\n").stages[0].modifiers
        assert modifier.skip.by == by


def test_every_layer_is_written_ranked(outlier, data, tmp_path):
    files = [tmp_path / f"layers.{kind}" for kind in ("csv", "json", "png", "svg")]
    options = [option for file in files for option in ("--output", file)]
    done = analyze(outlier, *data, "--static", *options, "--top", 3)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    written = json.loads(files[1].read_text())
    assert written["by"] == "output_error"
    assert len(rows) == len(written["layers"]) == 14
    assert rows[0]["name"] == written["layers"][0]["name"] == DOWN
    errors = [layer["output_error"] for layer in written["layers"]]
    assert errors == sorted(errors, reverse=True)
    width, height = struct.unpack(">II", files[2].read_bytes()[16:24])
    assert width > 2 * height > 0
    svg = files[3].read_text()
    assert svg.startswith("<?xml")
    assert svg.count("<!-- 1.mlp.down_proj -->") == 3  # the first of each panel
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files}
    again = [tmp_path / "again.svg", tmp_path / "again.png"]
    for file in again:
        analyze(outlier, *data, "--static", "--output", file, "--top", 3)
    assert again[0].read_bytes() == files[3].read_bytes()
    assert again[1].read_bytes() == files[2].read_bytes()


def test_analyzing_changes_nothing(pico):
    model = AutoModelForCausalLM.from_pretrained(pico).eval()
    tokens = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(tokens).logits
        for scheme in (preset("W8A8", ["Linear"], dynamic=False), preset("W8A16", ["Linear"])):
            assert len(layer_costs(model, tokens, scheme)) == 14
        assert torch.equal(model(tokens).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_input_is_told(pico, data, tmp_path):
    with pytest.raises(ModelError, match="no multiple of group_size 128"):
        analyze(pico, *data, "--scheme", "W4A16")
    assert analyze(pico, *data, "--scheme", "W4A16", "--group-size", 32).exit_code == 0
    with pytest.raises(RecipeError, match=r"a picture a .png or .svg, got '.pdf'"):
        analyze(pico, *data, "--output", tmp_path / "layers.pdf")
    with pytest.raises(RecipeError, match="make it first"):
        analyze(pico, *data, "--output", tmp_path / "nowhere" / "layers.csv")
    with pytest.raises(DataError):
        analyze(pico, "--data", tmp_path / "none.txt")
    with pytest.raises(DataError):
        analyze(pico, "--data", "")
    with pytest.raises(ModelError, match="no such folder"):
        analyze(tmp_path / "none", *data)
    for options in (("--top", 0), ("--samples", 0), ("--by", "magic"), ("--scheme", "W2A2")):
        assert analyze(pico, *options).exit_code == 2


@pytest.mark.parametrize("broken", ["weights", "inputs"])
def test_a_model_that_is_not_finite_has_no_ranking(pico, broken):
    model = AutoModelForCausalLM.from_pretrained(pico).eval()
    block = model.model.layers[1]
    part = block.mlp.down_proj if broken == "weights" else block.post_attention_layernorm
    with torch.no_grad():
        part.weight[0] = float("nan")
    tokens = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="finite"):
        layer_costs(model, tokens, preset("W8A8", ["Linear"], dynamic=False))


def test_a_model_without_linears_is_told():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=300, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(TargetError, match=r"no decoder block has a Linear.*Conv1D"):
        layer_costs(model, tokens, preset("W8A8", ["Linear"]))


def test_short_names():
    names = ["model.layers.0.mlp.up", "model.layers.1.mlp.up"]
    assert short_names(names) == dict(zip(names, ["0.mlp.up", "1.mlp.up"], strict=True))
    assert short_names(["a.b"]) == {"a.b": "b"}
