"""LoRA in a training stage: few parameters are trained, and held zeros survive the merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr

from paring.errors import ModelError, RecipeError
from paring.modifiers import Masks, Modifier, Session, registry
from paring.pipeline import load_model
from paring.pipeline.apply import ApplyResult, apply
from paring.pipeline.lora import adapters
from paring.recipes import DataConfig, LoraConfig, Recipe, Stage, TrainingConfig


class Killed(Exception):
    """Stands for a crash."""


class _Watch(Modifier):
    """Notes which parameters are trained, and may kill the run."""

    _kill_at: int | None = PrivateAttr(default=None)
    _trained: set[str] = PrivateAttr(default_factory=set)

    def on_gradients(self, session: Session) -> None:
        if session.step == self._kill_at:
            raise Killed
        named = session.model.named_parameters()
        self._trained |= {name for name, p in named if p.grad is not None and p.grad.any()}

    def state_dict(self) -> dict[str, Any]:
        return {}


def run(
    pico: Path,
    corpus: Path,
    output: Path | None = None,
    kill_at: int | None = None,
    saving: bool = False,
    **lora: Any,
) -> tuple[ApplyResult, set[str]]:
    kinds, watch = registry(), _Watch()
    watch._kill_at = kill_at
    text = DataConfig(dataset=str(corpus / "train.txt"), length=16, samples=16)
    training = TrainingConfig(
        epochs=2.0,
        batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        lora=LoraConfig(r=4, **lora),
        gradient_checkpointing=saving,
    )
    prune = kinds["MagnitudePruning"](sparsity=0.5, targets=["mlp.up_proj", "v_proj"])
    modifiers = [
        kinds["ConstantPruning"](ignore=["lm_head"]),
        kinds["SquareHead"](teacher="self"),
        watch,
    ]
    stages = [
        Stage(run="oneshot", data=text, modifiers=[prune]),
        Stage(run="train", data=text, training=training, modifiers=modifiers),
    ]
    made = Recipe(model=str(pico), stages=stages)
    return apply(made, output=output, evaluate=False), watch._trained


def test_zeros_survive_and_only_what_was_meant_changes(pico: Path, corpus: Path) -> None:
    result, trained = run(pico, corpus, target_modules=["up_proj", "down_proj"])
    assert trained
    assert all(".lora_" in name for name in trained)
    assert result.pared is not None
    model, base = result.pared.model, load_model(pico)[0]
    assert [name for name, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, weight in base.named_parameters():
        now, mask = model.get_parameter(name), result.pared.masks.get(name)
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        changed = (now != weight)[kept]
        assert changed.float().mean() > 0.9 if "up_proj" in name or "down_proj" in name else True
        if "_proj" not in name or "self_attn" in name:
            assert not changed.any(), name
        assert not now[~kept].any()
    up = result.pared.masks["model.layers.0.mlp.up_proj.weight"]
    assert float(up.float().mean()) == pytest.approx(0.5, abs=0.01)
    log = result.report["stages"][1]["log"]
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_what_is_merged_is_what_was_computed(pico: Path, dropout: float) -> None:
    model, _ = load_model(pico)
    masks = Masks()
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    masks.hold(name, mask)
    masks.apply(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        with adapters(model, LoraConfig(lora_dropout=dropout), masks, seed=0):
            model.eval()  # no dropout
            torch.testing.assert_close(model(ids).logits, before)  # LoRA begins at nothing
            added = [p for n, p in model.named_parameters() if "lora_B" in n]
            assert len(added) == 14
            for parameter in added:
                parameter.normal_(std=0.1)
            with_adapters = model(ids).logits
        assert not torch.allclose(with_adapters, before, atol=1e-2)
        torch.testing.assert_close(model(ids).logits, with_adapters, rtol=1e-4, atol=1e-4)
    assert not model.get_parameter(name)[~mask].any()


def test_a_killed_run_resumed_is_bit_identical(pico: Path, corpus: Path, tmp_path: Path) -> None:
    run(pico, corpus, tmp_path / "whole", lora_dropout=0.1)
    with pytest.raises(Killed):
        run(pico, corpus, tmp_path / "killed", kill_at=5, lora_dropout=0.1)
    run(pico, corpus, tmp_path / "killed", lora_dropout=0.1)
    for file in ("model.safetensors", "pruning_masks.npz"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert (tmp_path / "killed" / file).read_bytes() == whole


def test_recomputed_activations_change_nothing(pico: Path, corpus: Path) -> None:
    plain, saving = (run(pico, corpus, saving=saving)[0] for saving in (False, True))
    logs = [result.report["stages"][1]["log"] for result in (plain, saving)]
    assert [e["loss"] for e in logs[0]] == pytest.approx([e["loss"] for e in logs[1]], rel=1e-5)


@pytest.mark.parametrize(
    "modifier",
    ["Quantization: {}", "TrainableParams: {targets: [Linear]}"]
    + [f"{name}: {{final_sparsity: 0.5}}" for name in ("MovementPruning", "OBSPruning")],
)
def test_what_trains_weights_needs_a_stage_without_it(modifier: str) -> None:
    text = """
version: 1
model: zoo:pico
stages:
  - run: train
    data: {dataset: zoo:python-docs}
    training: {epochs: 1, batch_size: 1, learning_rate: 1e-4%s}
    modifiers: [%s]
"""
    Recipe.parse(text % ("", modifier))
    with pytest.raises(
        RecipeError, match=r"8:\d+: \w+ needs the weights trained, which lora freezes"
    ):
        Recipe.parse(text % (", lora: {r: 4}", modifier))


def test_what_is_missing_is_told(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(pico)
    wrong = adapters(model, LoraConfig(target_modules=["up"]), Masks(), 0)
    with pytest.raises(ModelError, match="matches no Linear.*up_proj"), wrong:
        pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(ModelError, match=r"peft>=0.14"),
        adapters(model, LoraConfig(), Masks(), 0),
    ):
        pass
