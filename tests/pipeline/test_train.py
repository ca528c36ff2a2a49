"""Training stages through the real Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr

from paring.modifiers import Modifier, Session, registry
from paring.pipeline.apply import ApplyResult, apply
from paring.pipeline.train import last_checkpoint
from paring.recipes import DataConfig, MixturePart, Recipe, Stage, TrainingConfig

GRADUAL = {"init_sparsity": 0.1, "final_sparsity": 0.6, "ignore": ["lm_head"]}


class Killed(Exception):
    """Stands for a crash."""


class _Watch(Modifier):
    """Notes what it sees at each optimizer step; stands last in the list."""

    _seen: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _kill_at: int | None = PrivateAttr(default=None)
    _batches: int = PrivateAttr(default=0)

    def on_loss(
        self, session: Session, loss: torch.Tensor, batch: Mapping[str, Any], outputs: Any
    ) -> torch.Tensor:
        self._batches += 1
        return loss

    def on_gradients(self, session: Session) -> None:
        if session.step == self._kill_at:
            raise Killed
        self._seen.append({"step": session.step, "epoch": session.epoch, **_zeros(session)})

    def state_dict(self) -> dict[str, Any]:
        return {}


def _zeros(session: Session) -> dict[str, float]:
    """Sparsity of each pruned weight as it lies in the model."""
    return {
        name: 1 - int(session.model.get_parameter(name).count_nonzero()) / mask.numel()
        for name, mask in session.masks.items()
    }


def recipe(pico: Path, corpus: Path, *modifiers: Modifier, **training: Any) -> Recipe:
    settings = {"epochs": 3.0, "batch_size": 4, "learning_rate": 1e-3, **training}
    stage = Stage(
        run="train",
        data=DataConfig(dataset=str(corpus / "train.txt"), length=16, samples=24),
        training=TrainingConfig(**settings),
        modifiers=list(modifiers),
    )
    return Recipe(model=str(pico), stages=[stage])


def gradual(**fields: Any) -> Modifier:
    return registry()["MagnitudePruning"](**{**GRADUAL, **fields})


def weights(result: ApplyResult) -> dict[str, torch.Tensor]:
    assert result.pared is not None
    return result.pared.model.state_dict()


def test_gradual_pruning_follows_the_cubic_schedule_at_every_step_and_holds_its_mask(
    pico: Path, corpus: Path
) -> None:
    watch = _Watch()
    modifier = gradual(start=0.5, end=2.5)
    result = apply(recipe(pico, corpus, modifier, watch), evaluate=False)
    steps = 6  # per epoch: 24 samples in batches of 4
    assert [seen["step"] for seen in watch._seen] == list(range(3 * steps))
    assert [seen["epoch"] for seen in watch._seen] == [s / steps for s in range(3 * steps)]
    for seen in watch._seen:
        step, epoch = seen.pop("step"), seen.pop("epoch")
        if step < 3:
            assert not seen
            continue
        p = min((epoch - 0.5) / 2.0, 1.0)
        due = 0.1 + (0.6 - 0.1) * ((p - 1) ** 3 + 1)
        assert len(seen) == 14
        for name, sparsity in seen.items():
            size = result.pared.model.get_parameter(name).numel()  # type: ignore[union-attr]
            assert sparsity == pytest.approx(due, abs=1 / size), (step, name)
    assert result.pared is not None
    for name, mask in result.pared.masks.items():
        final = result.pared.model.get_parameter(name)
        assert not final[~mask].any()
        assert int(mask.sum()) == final.numel() - round(0.6 * final.numel())


def test_the_clock_counts_optimizer_steps_under_gradient_accumulation(
    pico: Path, corpus: Path
) -> None:
    watch = _Watch()
    made = recipe(pico, corpus, watch, gradient_accumulation=4, epochs=2.0)
    log = apply(made, evaluate=False).report["stages"][0]["log"]
    assert watch._batches == 12  # 6 batches an epoch
    assert [seen["epoch"] for seen in watch._seen] == [0, 0.5, 1, 1.5]  # 4 and 2 batches a step
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]


def test_accumulation_gives_the_step_of_the_whole_batch(pico: Path, corpus: Path) -> None:
    whole = apply(recipe(pico, corpus, batch_size=8, max_steps=2), evaluate=False)
    parts = recipe(pico, corpus, batch_size=2, gradient_accumulation=4, max_steps=2)
    for name, weight in weights(apply(parts, evaluate=False)).items():
        torch.testing.assert_close(weight, weights(whole)[name], rtol=0, atol=2e-4)


def test_max_steps_ends_early_and_never_late(pico: Path, corpus: Path) -> None:
    for steps, expected in ((3, 3), (1000, 6)):
        made = recipe(pico, corpus, max_steps=steps, epochs=1.0)
        assert len(apply(made, evaluate=False).report["stages"][0]["log"]) == expected


def killable(pico: Path, corpus: Path, output: Path, kill_at: int | None) -> ApplyResult:
    """A run of 18 steps in 6 epochs with a checkpoint every 4 steps; its steps are in the report."""
    watch = _Watch()
    watch._kill_at = kill_at
    settings = {"gradient_accumulation": 2, "epochs": 6.0, "save_steps": 4}
    made = recipe(pico, corpus, gradual(end=5.0), watch, **settings)
    result = apply(made, output=output, evaluate=False)
    result.report["steps"] = [seen["step"] for seen in watch._seen]
    return result


@pytest.fixture(scope="module")
def whole(pico: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ApplyResult:
    return killable(pico, corpus, tmp_path_factory.mktemp("whole") / "out", None)


@pytest.mark.parametrize("kill_at", [3, 8, 16])
def test_a_run_killed_mid_epoch_and_resumed_is_bit_identical(
    pico: Path, corpus: Path, tmp_path: Path, whole: ApplyResult, kill_at: int
) -> None:
    with pytest.raises(Killed):
        killable(pico, corpus, tmp_path / "out", kill_at)
    resumed = killable(pico, corpus, tmp_path / "out", None)
    assert resumed.report["steps"] == list(range(kill_at // 4 * 4, 18))
    assert weights(resumed).keys() == weights(whole).keys()
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name
    assert whole.output is not None
    for file in ("model.safetensors", "pruning_masks.npz"):
        assert (tmp_path / "out" / file).read_bytes() == (whole.output / file).read_bytes()
    assert resumed.report["stages"][0]["log"] == whole.report["stages"][0]["log"]


def test_a_run_killed_after_its_last_step_makes_no_other(
    pico: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 steps of 6 in an epoch: the Trainer, asked to go on from its last checkpoint, would make one more."""

    def run(output: Path) -> ApplyResult:
        settings = {"epochs": 3.0, "max_steps": 15, "lr_scheduler": "constant"}
        made = recipe(pico, corpus, gradual(end=2.0), **settings)
        return apply(made, output=output, evaluate=False)

    def killed(session: Session) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Session, "finish", killed)
        run(tmp_path / "out")
    resumed, through = run(tmp_path / "out"), run(tmp_path / "through")
    assert len(resumed.report["stages"][0]["log"]) == 15
    assert resumed.report["stages"][0]["log"] == through.report["stages"][0]["log"]
    for file in ("model.safetensors", "pruning_masks.npz"):
        other = (tmp_path / "through" / file).read_bytes()
        assert (tmp_path / "out" / file).read_bytes() == other


def test_a_checkpoint_without_its_last_file_is_not_resumed_from(tmp_path: Path) -> None:
    for step, files in ((4, ["session.pt"]), (8, ["session.pt"]), (12, ["model.safetensors"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_gradients_of_held_zeros_do_not_count_when_gradients_are_clipped(
    pico: Path, corpus: Path
) -> None:
    class _Norm(_Watch):
        def on_gradients(self, session: Session) -> None:
            total = sum(float(p.grad.square().sum()) for p in session.model.parameters())
            self._seen.append({"norm": math.sqrt(total)})

        def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
            total = sum(float(p.grad.square().sum()) for p in session.model.parameters())
            self._seen[-1]["clipped"] = math.sqrt(total)

    norm = _Norm()
    applied = apply(recipe(pico, corpus, gradual(), norm, max_steps=2), evaluate=False)
    for seen in norm._seen:
        assert seen["norm"] > 1
        assert seen["clipped"] == pytest.approx(1.0, rel=1e-4)
    logged = [entry["grad_norm"] for entry in applied.report["stages"][0]["log"]]
    assert logged == pytest.approx([seen["norm"] for seen in norm._seen], rel=1e-4)


@pytest.mark.parametrize("setting", ["bf16", "gradient_checkpointing"])
def test_memory_savers_train_the_same_model(pico: Path, corpus: Path, setting: str) -> None:
    class _Layers(Modifier):
        def on_gradients(self, session: Session) -> None:
            layers = session.model.modules()
            session.log("on", any(getattr(m, "gradient_checkpointing", False) for m in layers))

    plain = apply(recipe(pico, corpus, max_steps=2), evaluate=False)
    settings = {"max_steps": 2, setting: True}
    saving = apply(recipe(pico, corpus, _Layers(), **settings), evaluate=False)
    on = saving.report["stages"][0]["log"][0]["on"]
    assert on == (setting == "gradient_checkpointing")
    name = "model.layers.0.mlp.up_proj.weight"
    exact = torch.equal(weights(plain)[name], weights(saving)[name])
    assert exact == (setting == "gradient_checkpointing")
    losses = [[e["loss"] for e in r.report["stages"][0]["log"]] for r in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_rate_of_a_window_wins_over_the_trainers_scheduler(pico: Path, corpus: Path) -> None:
    class _Rate(_Watch):
        def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
            self._seen[-1]["after"] = optimizer.param_groups[0]["lr"]

    rate = registry()["LearningRate"](init_lr=2e-3, final_lr=0.0, unit="steps", start=2, end=4)
    settings = {"epochs": 1.0, "lr_scheduler": "linear"}
    watch = _Rate()
    made = recipe(pico, corpus, rate, watch, **settings)
    log = apply(made, evaluate=False).report["stages"][0]["log"]
    plain = apply(recipe(pico, corpus, **settings), evaluate=False).report["stages"][0]["log"]
    theirs = [1e-3 * (6 - step) / 6 for step in range(6)]
    assert [seen["after"] for seen in watch._seen] == pytest.approx(theirs)  # put back
    assert [log[2]["learning_rate"], log[3]["learning_rate"]] == pytest.approx([2e-3, 1e-3])
    for step in (0, 1, 4, 5):
        assert log[step]["learning_rate"] == plain[step]["learning_rate"]
    assert [entry["loss"] for entry in log[:3]] == [entry["loss"] for entry in plain[:3]]
    assert log[3]["loss"] != plain[3]["loss"]


def test_quantization_aware_training_is_exported_and_resumes_bit_for_bit(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    def go(output: Path, kill_at: int | None) -> ApplyResult:
        watch = _Watch()
        watch._kill_at = kill_at
        kind = registry()["Quantization"]
        aware = kind(dynamic=False, start=0.5, freeze_observer=1.0, ignore=["lm_head"])
        modifiers = [gradual(end=0.5), aware, watch]
        made = recipe(pico, corpus, *modifiers, epochs=2.0, save_steps=5)
        return apply(made, output=output, evaluate=False, verify=True)

    whole = go(tmp_path / "whole", None)
    with pytest.raises(Killed):
        go(tmp_path / "killed", 8)
    resumed = go(tmp_path / "killed", None)
    assert whole.output is not None
    for file in ("model.safetensors", "pruning_masks.npz", "graph/graph.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (whole.output / file).read_bytes()
    schemes = {entry["scheme"] for entry in resumed.report["layers"]}
    assert schemes == {"W8A8"}
    assert resumed.report["after"]["sparsity"] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("kind", ["stream", "mixture", "packed"])
def test_every_kind_of_data_resumes_in_the_middle_of_an_epoch_bit_for_bit(
    pico: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    sums = {"dataset": str(corpus / "sums.jsonl"), "prompt": "{question}", "answer": " {answer}"}
    text = MixturePart(dataset=str(corpus / "train.txt"), weight=2)
    mixed = [text, MixturePart(weight=1, **sums)]
    data = {
        "stream": DataConfig(mixture=mixed, length=16, samples=20, streaming=True, buffer_size=8),
        "mixture": DataConfig(mixture=mixed, length=16, samples=20),
        "packed": DataConfig(length=48, packing=True, **sums),
    }[kind]

    def go(output: Path, kill_at: int | None) -> tuple[ApplyResult, list[int]]:
        watch = _Watch()
        watch._kill_at = kill_at
        teacher = registry()["SquareHead"](teacher="self")
        made = recipe(
            pico, corpus, teacher, watch, epochs=3.0, save_steps=4, gradient_accumulation=2
        )
        made.stages[0].data = data
        return apply(made, output=output, evaluate=False), [seen["step"] for seen in watch._seen]

    whole, steps = go(tmp_path / "whole", None)
    assert len(steps) >= 6
    killed_at = len(steps) - 1
    with pytest.raises(Killed):
        go(tmp_path / "killed", killed_at)
    resumed, again = go(tmp_path / "killed", None)
    assert again == steps[killed_at // 4 * 4 :]
    assert resumed.report["stages"][0]["log"] == whole.report["stages"][0]["log"]
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name
