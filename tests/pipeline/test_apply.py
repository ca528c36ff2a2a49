"""`recipe apply` as a user types it, on a pico model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from paring import cli
from paring.errors import DataError, ModelError, RecipeError
from paring.modifiers.sizes import sizes
from paring.pipeline import apply, load_model
from paring.pipeline.report import size_change, summary_table
from paring.pipeline.runfolder import RunFolder
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
        with open(os.environ["PARING_VISITS"], "a") as file:
            file.write(str(block.index))
        if block.index == 1 and "PARING_KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
"""
# Calls counted anew in every process: in the journal, keeping the model, writing the graph, flushing the result, and
# before `config.json` is moved.
KILLS = (7, 17, 9, 15, 25)
VARYING = (".paring", "report.json", "report.html")  # seconds, and where the run was stopped

# Ends the process at a call of fsync: between blocks, between stages, while checkpoint and graph are written and moved.
FSYNC_KILLER = """\
import os, runpy, signal

calls, fsync = 0, os.fsync

def count(descriptor):
    global calls
    calls += 1
    if calls == int(os.environ["PARING_KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = count
runpy.run_module("paring", run_name="__main__", alter_sys=True)
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
    result = run(recipe, "--output", output, "--set", "sparsity=0.75", "--verify")
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


def test_json_is_the_report(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run(recipe, "--output", output, "--json", "--no-evaluate")
    assert json.loads(result.stdout) == json.loads((output / "report.json").read_text())
    assert "perplexity" not in json.loads(result.stdout)["before"]


def test_a_finished_run_is_not_done_again_but_measured_if_it_was_not(
    recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = apply(str(recipe), output=output, evaluate=False)
    made = (output / "model.safetensors").stat().st_mtime_ns
    again = apply(str(recipe), output=output, evaluate=False)
    assert again.pared is None
    assert again.report == first.report
    assert (output / "model.safetensors").stat().st_mtime_ns == made
    measured = apply(str(recipe), output=output)
    assert measured.report["stages"] == first.report["stages"]  # seconds and all: nothing ran twice
    assert measured.report["after"]["perplexity"] > 1
    assert apply(str(recipe), output=output, evaluate=False).report == measured.report


def test_another_recipe_in_the_same_folder_is_refused_until_fresh(
    recipe: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    apply(str(recipe), output=output, evaluate=False)
    result = run(recipe, "--output", output, "--set", "sparsity=0.7", "--no-evaluate")
    assert isinstance(result.exception, RecipeError)  # `main` prints it and exits 2
    message = str(result.exception)
    assert "another recipe, model or data" in message
    assert "sparsity: 0.7" in message
    assert "--fresh" in message
    (output / "mine.txt").write_text("keep")
    (output / "config.json").unlink()
    result = run(recipe, "--output", output, "--set", "sparsity=0.7", "--no-evaluate", "--fresh")
    assert result.exit_code == 0, result.output
    report = json.loads((output / "report.json").read_text())
    assert report["after"]["sparsity"] == pytest.approx(0.7, abs=1e-2)
    assert (output / "mine.txt").read_text() == "keep"


def test_the_device_is_told_and_a_wrong_one_refused(recipe: Path, tmp_path: Path) -> None:
    result = apply(Recipe.load(str(recipe)), evaluate=False, device="cpu")
    assert result.report["stages"][0]["device"] == "cpu"
    for name in ("xpu", "no-such-device"):  # no build for CPU and CUDA has either
        with pytest.raises(ModelError, match=f"device {name}: PyTorch can't use it here"):
            apply(str(recipe), output=tmp_path / "out", device=name)
        assert not (tmp_path / "out").exists()


def test_a_users_folder_is_not_written_into(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    with pytest.raises(RecipeError, match="is not empty and no run of `recipe apply`"):
        apply(str(recipe), output=tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_another_model_is_another_run(recipe: Path, tmp_path: Path, pico: Path) -> None:
    apply(str(recipe), output=tmp_path / "out", evaluate=False)
    model, tokenizer = load_model(pico)
    model.get_parameter("model.norm.weight").data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(RecipeError, match="another recipe, model or data"):
        apply(str(recipe), tmp_path / "other", tmp_path / "out", evaluate=False)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (
            "run: oneshot, data: {dataset: {corpus}/train.txt, samples: 999, length: 32}",
            "asks for 999 samples",
        ),
        (
            "run: train, data: {dataset: {corpus}/train.txt, samples: 999, length: 32}",
            "asks for 999 samples",
        ),
        (
            "run: train, data: {dataset: {corpus}/empty.jsonl, text: a, streaming: true, samples: 9, length: 32}",
            "no rows",
        ),
    ],
)
def test_too_few_data_of_a_later_stage_are_told_before_the_first(
    recipe: Path, tmp_path: Path, corpus: Path, later: str, message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    later = later.replace("{corpus}/empty", f"{tmp_path}/empty").replace("{corpus}", str(corpus))
    if "train," in later:
        later += ", training: {epochs: 1, batch_size: 2, learning_rate: 1e-4}"
    stage = f"  - {{name: later, {later}, modifiers: [ConstantPruning: {{ignore: [lm_head]}}]}}\n"
    recipe.write_text(recipe.read_text().replace("evaluate:", stage + "evaluate:"))
    seen = []
    with pytest.raises(DataError, match=message):
        apply(
            str(recipe),
            output=tmp_path / "out",
            progress=lambda label, done, total, note="": seen.append(label),
        )
    assert not any("pare" in label for label in seen)
    recipe.write_text(recipe.read_text().replace(stage, ""))  # mended, it may take the same folder
    apply(str(recipe), output=tmp_path / "out", evaluate=False)


def test_data_that_changed_are_another_run(recipe: Path, tmp_path: Path, corpus: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text((corpus / "train.txt").read_text())
    recipe.write_text(recipe.read_text().replace(str(corpus / "train.txt"), str(text)))
    apply(str(recipe), output=tmp_path / "out", evaluate=False)
    text.write_text(text.read_text() + " The end.")
    with pytest.raises(RecipeError, match="another recipe, model or data"):
        apply(str(recipe), output=tmp_path / "out", evaluate=False)


def test_two_runs_at_once_do_not_share_a_folder(recipe: Path, tmp_path: Path) -> None:
    busy = pytest.raises(RecipeError, match="another process is at work here")
    with RunFolder.open(tmp_path / "out", "recipe", "inputs"), busy:
        apply(str(recipe), output=tmp_path / "out", evaluate=False)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_one_shot_run_killed_by_the_system_goes_on_and_ends_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER)
    text = recipe.read_text().replace(
        "      - Quantization", "      - Killer: {}\n      - Quantization"
    )
    recipe.write_text(text)
    command = [sys.executable, "-m", "paring", "apply", str(recipe), "--no-evaluate"]
    command += ["--use", str(killer), "--output", str(tmp_path / "killed")]
    visits = tmp_path / "visits"
    monkeypatch.setenv("PARING_VISITS", str(visits))
    environment = {**os.environ, "PARING_KILL": "1", "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "killed" / "config.json").exists()
    arguments = (recipe, "--use", killer, "--no-evaluate", "--output")
    resumed = run(*arguments, tmp_path / "killed")
    assert resumed.exit_code == 0, resumed.output
    assert visits.read_text() == "01" + "1"  # block 0 was finished and is not done again
    whole = run(*arguments, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    for file in ("model.safetensors", "pruning_masks.npz", "config.json", "graph/graph.json"):
        killed = (tmp_path / "killed" / file).read_bytes()
        assert killed == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.parametrize("size", [60_000, 250_000])  # bytes; torch, and safetensors, writes more
def test_a_disk_without_room_is_told_and_the_run_goes_on_later(
    recipe: Path, tmp_path: Path, size: int
) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    command = [sys.executable, "-c", f"{limit}; from paring.cli import main; main()", "apply"]
    command += [str(recipe), "--no-evaluate", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert f"{tmp_path / 'out'}: " in full.stderr
    assert "goes on from what was saved" in full.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    resumed = run(recipe, "--no-evaluate", "--output", tmp_path / "out")
    assert resumed.exit_code == 0, resumed.output


def test_a_run_killed_again_and_again_wherever_it_writes_ends_the_same(
    recipe: Path, tmp_path: Path
) -> None:
    whole = run(recipe, "--no-evaluate", "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    killer = tmp_path / "killer.py"
    killer.write_text(FSYNC_KILLER)
    output = tmp_path / "killed"
    command = [sys.executable, str(killer), "apply", str(recipe), "--no-evaluate"]
    command += ["--output", str(output)]
    for call in KILLS:
        environment = {**os.environ, "PARING_KILL": str(call), "OMP_NUM_THREADS": "1"}
        died = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (output / "config.json").exists()
    resumed = run(recipe, "--no-evaluate", "--output", output)
    assert resumed.exit_code == 0, resumed.output
    kept = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")]
    for file in kept:
        if (tmp_path / "whole" / file).is_file() and file.parts[0] not in VARYING:
            assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_the_model_makes_room_and_comes_back(pico: Path, tmp_path: Path) -> None:
    model, _ = load_model(pico)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with RunFolder.open(tmp_path / "out", "recipe", "inputs") as folder:
        folder.finish_stage({}, model, {})
        with folder.set_aside(model):
            assert sum(parameter.numel() for parameter in model.parameters()) == 0
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.lm_head.weight is model.model.embed_tokens.weight  # tied as it was


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_kept_model_that_does_not_fit_is_an_error(
    pico: Path, tmp_path: Path, change: str
) -> None:
    model, _ = load_model(pico)
    with RunFolder.open(tmp_path / "out", "recipe", "inputs") as folder:
        folder.finish_stage({}, model, {"sizes": sizes(model)})
        file = tmp_path / "out" / ".paring" / "after-0" / "model.safetensors"
        tensors = load_file(file)
        values = tensors.pop("model.norm.weight")
        tensors["model.norm.weight" if change == "shape" else "other"] = values[:1]
        save_file(tensors, file, metadata={"lm_head.weight": "model.embed_tokens.weight"})
        with pytest.raises(ModelError, match="is not as in the model; start over with --fresh"):
            folder.load_stage(model)


def test_stages_hand_on_masks_and_a_run_stopped_between_them_resumes(
    recipe: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recover = f"""\
  - name: recover
    run: train
    data: {{dataset: {corpus}/sums.jsonl, length: 64, prompt: "{{question}}", answer: " {{answer}}"}}
    training: {{epochs: 1, batch_size: 8, learning_rate: 1e-3}}
    modifiers:
      - Distillation: {{teacher: self, weight: 0.5}}
      - SquareHead: {{teacher: self}}
  - name: quantize
    run: oneshot
    modifiers:
      - Quantization: {{scheme: W8A8, ignore: [lm_head]}}
evaluate"""
    text = recipe.read_text().replace(
        "      - Quantization: {scheme: W8A8, ignore: [lm_head]}\n", ""
    )
    recipe.write_text(text.replace("evaluate", recover))
    whole = apply(str(recipe), output=tmp_path / "whole", evaluate=False)
    log = whole.report["stages"][1]["log"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]
    assert all(entry["loss/kl"] >= 0 and entry["loss/squarehead"] > 0 for entry in log)
    assert whole.pared is not None
    for name, mask in whole.pared.masks.items():
        assert not whole.pared.model.get_parameter(name)[~mask].any()

    calls: list[int] = []

    def stop(*args: object, **kwargs: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_module("paring.pipeline.apply"), "run_training", stop)
        with pytest.raises(KeyboardInterrupt):
            apply(str(recipe), output=tmp_path / "stopped", evaluate=False)
    with monkeypatch.context() as patched:
        patched.setattr(import_module("paring.pipeline.apply"), "write_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            apply(str(recipe), output=tmp_path / "stopped", evaluate=False)
    assert len(calls) == 2
    resumed = apply(str(recipe), output=tmp_path / "stopped", evaluate=False)
    assert resumed.pared is not None
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        expected = whole.pared.model(tokens).logits
        assert torch.equal(resumed.pared.model(tokens).logits, expected)  # input quantizers too
    for run_ in ("whole", "stopped"):
        stored = (tmp_path / run_ / "model.safetensors").read_bytes()
        assert stored == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("load", [0.9, 3.0])
def test_speeds_of_a_busy_machine_are_marked_as_such(load: float) -> None:
    report = {
        "before": {"sparsity": 0.0, "bytes": 400_000_000},
        "after": {"sparsity": 0.5, "bytes": 100_000_000},
        "layers": [{"scheme": "W8A8"}, {"scheme": "W8A8"}, {"scheme": "float"}],
        "speed": {"torch": 20.0, "dense": 25.0, "pared": 100.0, "load": load},
    }
    table = summary_table(report)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("sparsity", "0.0%", "50.0%", "2 layers W8A8, 1 layers float"),
        ("size", "400.0 MB", "100.0 MB", "4.0 x smaller"),
        ("tokens/s", "25.0", "100.0", "4.0 x dense FP32, same engine"),
        ("tokens/s", "20.0", "100.0", "5.0 x dense FP32, torch"),
    ]
    assert (table.caption is not None) == (load > 1.5)


def test_a_graph_that_grew_is_called_larger() -> None:
    assert size_change(100, 50) == "2.0 x smaller"
    assert size_change(100, 111) == "1.1 x larger"
