"""Prune, then train with the zeros held and the dense model as the teacher: the laws, through the real Trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr

from paring.modifiers import Modifier, Session, registry
from paring.pipeline.apply import ApplyResult, apply
from paring.recipes import DataConfig, Recipe, Stage, TrainingConfig

STEPS, SAVED = 15, 4


class Killed(Exception):
    """Stands for a crash."""


class _Law(Modifier):
    """Looks, at each step, for life in held zeros; stands last."""

    _kill_at: int | None = PrivateAttr(default=None)
    _looked: list[int] = PrivateAttr(default_factory=list)

    def on_gradients(self, session: Session) -> None:
        if session.step == self._kill_at:
            raise Killed
        for name, mask in session.masks.items():
            gradient = session.model.get_parameter(name).grad
            assert gradient is not None
            assert not gradient[~mask].any()
            assert gradient[mask].any()

    def on_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        for name, mask in session.masks.items():
            parameter = session.model.get_parameter(name)
            assert not parameter[~mask].any()
            moments = [m for m in optimizer.state[parameter].values() if m.shape == mask.shape]
            assert len(moments) == 2
            assert not any(moment[~mask].any() for moment in moments)
            assert all(moment[mask].any() for moment in moments)
        self._looked.append(session.step)

    def state_dict(self) -> dict[str, Any]:
        return {}


def run(
    pico: Path,
    corpus: Path,
    output: Path | None = None,
    kill_at: int | None = None,
    teacher: str = "self",
    cache: str | bool = False,
) -> tuple[ApplyResult, list[int]]:
    """Half of the weights go in one shot, then 15 steps, into a third epoch, of unequal batches."""
    kinds, law = registry(), _Law()
    law._kill_at = kill_at
    text = DataConfig(dataset=str(corpus / "train.txt"), length=16, samples=8)
    prune = kinds["MagnitudePruning"](sparsity=0.5, ignore=["lm_head"])
    sums = DataConfig(
        dataset=str(corpus / "sums.jsonl"), length=32, prompt="{question}", answer=" {answer}"
    )
    training = TrainingConfig(
        epochs=3.0, batch_size=3, gradient_accumulation=2, learning_rate=1e-3, save_steps=SAVED
    )
    modifiers = [
        kinds["ConstantPruning"](ignore=["lm_head"]),
        kinds["SquareHead"](teacher=teacher),
        kinds["Distillation"](teacher=teacher, cache=cache, weight=0.5),
        law,
    ]
    stages = [
        Stage(run="oneshot", data=text, modifiers=[prune]),
        Stage(
            run="train",
            data=sums,
            training=training.model_copy(update={"max_steps": STEPS}),
            modifiers=modifiers,
        ),
    ]
    return apply(Recipe(model=str(pico), stages=stages), output=output, evaluate=False), law._looked


@pytest.fixture(scope="module")
def whole(pico: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    _, looked = run(pico, corpus, folder / "out", cache=str(folder / "cache"))
    assert looked == list(range(STEPS))
    return folder


@pytest.mark.parametrize("kill_at", sorted(random.Random(4).sample(range(1, STEPS), 3)))
def test_a_recovery_killed_at_random_and_resumed_is_bit_identical(
    pico: Path, corpus: Path, tmp_path: Path, whole: Path, kill_at: int
) -> None:
    with pytest.raises(Killed):
        run(pico, corpus, tmp_path / "out", kill_at, cache=str(whole / "cache"))
    _, looked = run(pico, corpus, tmp_path / "out", cache=str(whole / "cache"))
    assert looked == list(range(kill_at // SAVED * SAVED, STEPS))
    for file in ("model.safetensors", "pruning_masks.npz"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / "out" / file).read_bytes()


def test_a_cache_that_is_full_half_full_or_empty_makes_no_difference(
    pico: Path, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    stored = sorted((whole / "cache").rglob("*.safetensors"))
    assert len(stored) == 40  # each sequence once, in more than two epochs
    for file in stored[::2]:
        file.unlink()
    # The cache's folder is a setting, so the run has to be another one for `output`.
    half, _ = run(pico, corpus, cache=str(whole / "cache"))
    empty, _ = run(pico, corpus, cache=str(tmp_path / "cache"))
    assert half.report["stages"][1]["log"] == empty.report["stages"][1]["log"]


def test_self_is_the_model_before_the_recipe(pico: Path, corpus: Path) -> None:
    log = run(pico, corpus)[0].report["stages"][1]["log"]
    named = run(pico, corpus, teacher=str(pico))[0].report["stages"][1]["log"]
    assert log == named
    assert log[0]["loss/squarehead"] > 0.1  # the student has lost half of its weights
    parts = log[0]["loss/task"] + log[0]["loss/squarehead"] + 0.5 * log[0]["loss/kl"]
    assert log[0]["loss/total"] == pytest.approx(parts, rel=1e-5)
    assert log[-1]["loss/squarehead"] < log[0]["loss/squarehead"]
