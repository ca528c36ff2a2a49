"""`torchrun` with two processes, as a user types it, against one process at the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paring.errors import ModelError
from paring.pipeline import apply
from paring.pipeline.processes import Processes
from paring.recipes import Recipe

RECIPE = """\
version: 1
model: {model}
args: {{accumulation: 1}}
stages:
  - name: prune
    run: oneshot
    data: {{dataset: {corpus}/train.txt, samples: 8, length: 16}}
    modifiers:
      - SparseGPT: {{sparsity: 0.3, ignore: [lm_head]}}
  - name: recover
    run: train
    data: {{dataset: {corpus}/sums.jsonl, samples: 24, length: 32, prompt: "{{question}}", answer: " {{answer}}"}}
    training:
      epochs: 2
      batch_size: 2
      gradient_accumulation: ${{accumulation}}
      learning_rate: 1e-3
      save_steps: 5
    modifiers:
      - MagnitudePruning: {{init_sparsity: 0.3, final_sparsity: 0.6, end: 1.5, ignore: [lm_head]}}
      - SquareHead: {{teacher: self}}
      - RankKiller: {{}}
"""
KILLER = """\
import os, signal
from paring import Modifier

class RankKiller(Modifier):
    stages = frozenset({"train"})

    def on_gradients(self, session):
        if session.step == 7 and os.environ.get("RANK") == os.environ.get("PARING_KILL", "none"):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def write(folder: Path, pico: Path, corpus: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(model=pico, corpus=corpus))
    (folder / "killer.py").write_text(KILLER)


def started(folder: Path, output: str, kill: str = "none") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "paring", "apply", str(folder / "recipe.yaml"), "--no-evaluate"]
    command += ["--use", str(folder / "killer.py"), "--output", str(folder / output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PARING_KILL": kill}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def in_two(folder: Path, output: str, kill: str = "none") -> int:
    done = started(folder, output, kill)
    if kill == "none":
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("sparsity") == 1  # the first process alone tells
    return done.returncode


def assert_same(one: Path, two: Path) -> None:
    """Masks to the bit; weights and what was logged within float error."""
    masks = [np.load(folder / "pruning_masks.npz") for folder in (one, two)]
    assert masks[0].files == masks[1].files != []
    for name in masks[0].files:
        assert (masks[0][name] == masks[1][name]).all(), name
    weights = load_file(two / "model.safetensors")
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)
    logs = [
        json.loads((folder / "report.json").read_text())["stages"][1]["log"]
        for folder in (one, two)
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["epoch"] == pytest.approx(theirs["epoch"])
        for part in ("loss", "loss/squarehead", "loss/task", "sparsity"):
            assert mine[part] == pytest.approx(theirs[part], rel=1e-4), part


def one(folder: Path) -> None:
    use = [folder / "killer.py"]
    alone = Recipe.load(folder / "recipe.yaml", set={"accumulation": 2}, use=use)
    apply(alone, output=folder / "one", evaluate=False)


@pytest.mark.usefixtures("own_registry")
def test_two_processes_train_what_one_does(pico: Path, corpus: Path, tmp_path: Path) -> None:
    write(tmp_path, pico, corpus)
    one(tmp_path)
    in_two(tmp_path, "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.usefixtures("own_registry")
def test_two_processes_read_a_stream_and_resume(pico: Path, corpus: Path, tmp_path: Path) -> None:
    write(tmp_path, pico, corpus)
    text = (tmp_path / "recipe.yaml").read_text()
    streamed = text.replace("samples: 24", "samples: 24, streaming: true, buffer_size: 9")
    (tmp_path / "recipe.yaml").write_text(streamed)
    one(tmp_path)
    in_two(tmp_path, "two")
    assert_same(tmp_path / "one", tmp_path / "two")
    assert in_two(tmp_path, "killed", kill="1") != 0
    in_two(tmp_path, "killed")
    for file in ("model.safetensors", "pruning_masks.npz"):
        whole = (tmp_path / "two" / file).read_bytes()
        assert (tmp_path / "killed" / file).read_bytes() == whole


@pytest.mark.parametrize("killed", ["none", "0", "1"])
def test_a_process_ends_without_the_words_of_gloo(
    pico: Path, corpus: Path, tmp_path: Path, killed: str
) -> None:
    write(tmp_path, pico, corpus)
    mine = tmp_path / "two" / "mine.txt"
    if killed == "none":  # the first refuses a folder that is not a run's
        mine.parent.mkdir()
        mine.write_text("keep")
    done = started(tmp_path, "two", killed)
    assert done.returncode != 0
    assert "Connection" not in done.stderr
    if killed == "none":
        assert f"{mine.parent}: is not empty" in done.stderr
        assert mine.read_text() == "keep"


def test_where_another_process_has_ended_its_message_is_pointed_to() -> None:
    with (
        pytest.raises(ModelError, match="process 1 of 2: another has ended"),
        Processes(1, 2).together(),
    ):
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
        )
    with pytest.raises(RuntimeError, match="^mine$"), Processes(1, 2).together():
        raise RuntimeError("mine")


def test_one_process_alone_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join()
    assert alone.is_first
    assert alone.mean({"a": 2.0}) == {"a": 2.0}
    alone.wait()
    alone.part()


def test_weights_in_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ModelError, match="can't hold zeros yet; use torchrun"):
        Processes.join()
