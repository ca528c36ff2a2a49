from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paring.cli import application
from paring.errors import RecipeError
from paring.recipes import Recipe
from paring.recipes.build import read_document

LEGACY = """<!-- licence -->

---
version: 1.1.0
num_epochs: &epochs 10
pruning_end: eval(num_epochs - 4)
init_lr: 1.5e-4

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: *epochs
  - !LearningRateFunctionModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
    lr_func: cyclic_linear
    init_lr: eval(init_lr)
    final_lr: 0.0

pruning_modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 1
    end_epoch: eval(pruning_end)
    update_frequency: 0.5
    leave_enabled: True
    inter_func: cubic
    mask_type: unstructured
  - !ConstantPruningModifier
    start_epoch: 0.0
    end_epoch: -1.0
    params: ['re:.*q_proj.weight']

quantization_modifiers:
  - !QuantizationModifier
    start_epoch: 8
    freeze_bn_stats_epoch: 9
    ignore: [LlamaRMSNorm]

distillation_modifiers:
  - !DistillationModifier
    hardness: 0.75
    distill_output_keys: [logits]
---
# A title: with a colon
"""

MODERN = """
ratio: 0.25
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: eval(ratio)
      mask_structure: "1:4"
      sequential_update: false
      targets: Linear
    WandaPruningModifier: {sparsity: 0.5, mask_structure: "0:0", targets: [__ALL_PRUNABLE__]}
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier: {targets: ['re:.*q_proj.weight'], start: 0}
quantization_stage:
  quantization_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8, mappings: [[[a], b]]}
    QuantizationModifier:
      ignore: ["lm_head"]
      config_groups:
        group_0:
          weights: {num_bits: 8, type: "int", symmetric: true, strategy: "channel"}
          output_activations: null
          targets: ["Linear"]
"""


def fields(modifier: Any) -> dict[str, Any]:
    given: dict[str, Any] = modifier.model_dump(exclude_unset=True)
    return given


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "old.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_legacy_sparseml() -> None:
    recipe = Recipe.parse(LEGACY, "old.md")
    (train,) = recipe.stages
    assert recipe.args["pruning_end"] == 6
    assert train.run == "train"
    assert train.training is not None
    assert (train.training.epochs, train.training.learning_rate) == (10, 1.5e-4)
    assert train.training.lr_scheduler == "linear"
    pruning, constant, quantization, distillation = train.modifiers
    assert pruning.key() == "MagnitudePruning"
    assert fields(pruning) == {
        "targets": ["Linear"],
        "init_sparsity": 0.05,
        "final_sparsity": 0.8,
        "start": 1,
        "end": 6,
        "update_frequency": 0.5,
        "update_scheduler": "cubic",
        "mask_structure": "unstructured",
    }
    assert fields(constant) == {"start": 0, "targets": ["re:.*q_proj.weight"]}
    assert fields(distillation) == {"teacher": "self", "temperature": 2.0, "weight": 3.0}
    assert quantization.key() == "Quantization"
    assert fields(quantization) == {"scheme": "W8A8", "start": 8}


def test_what_training_keeps_of_old_recipes() -> None:
    recipe = Recipe.parse(
        """
train_stage:
  run_type: train
  modifiers:
    - LearningRateFunctionModifier:
        {start_epoch: 1, end_epoch: 3, lr_func: cosine, init_lr: 1.0e-4, final_lr: 1.0e-5}
    - QuantizationModifier:
        start: 1
        disable_quantization_observer_epoch: 2
        ignore: [lm_head]
        config_groups:
          group_0:
            weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}
            targets: [Linear]
    - DistillationModifier: {hardness: 1.0}
"""
    )
    (stage,) = recipe.stages
    rate, quantization, task, distillation = stage.modifiers
    assert fields(rate) == {
        "start": 1,
        "end": 3,
        "lr_func": "cosine",
        "init_lr": 1e-4,
        "final_lr": 1e-5,
    }
    assert (fields(quantization)["start"], fields(quantization)["freeze_observer"]) == (1, 2)
    assert fields(quantization)["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert (task.key(), fields(task)) == ("TaskLoss", {"weight": 0})
    assert fields(distillation)["weight"] == 1


def test_modern_sparseml_and_llm_compressor() -> None:
    recipe = Recipe.parse(MODERN)
    sparsity, finetuning, quantization = recipe.stages
    assert [stage.name for stage in recipe.stages] == ["sparsity", "finetuning", "quantization"]
    assert [stage.run for stage in recipe.stages] == ["oneshot", "train", "oneshot"]
    sparse, wanda = sparsity.modifiers
    # Their 1:4 drops one of four, ours keeps three of four.
    assert fields(sparse) == {"sparsity": 0.25, "mask_structure": "3:4", "targets": ["Linear"]}
    assert (wanda.key(), fields(wanda)["mask_structure"]) == ("Wanda", "unstructured")
    assert [m.key() for m in finetuning.modifiers] == ["ConstantPruning"]
    smooth, quantize = quantization.modifiers
    assert fields(smooth) == {"smoothing_strength": 0.8}
    assert fields(quantize)["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_updates_of_what_has_none_are_left_out() -> None:
    text = LEGACY.replace("    end_epoch: -1.0\n", "    update_frequency: 0.5\n")
    text = text.replace("    hardness: 0.75\n", "    hardness: 0.75\n    update_frequency: -1\n")
    (train,) = Recipe.parse(text, "old.md").stages
    assert "update_frequency" not in fields(train.modifiers[1])
    _, notes = read_document(text, "old.md")
    said = [note for note in notes if "update_frequency" in note]
    assert said == ["ConstantPruning: update_frequency is left out, a constant mask has no updates"]


def test_what_changes_is_noted() -> None:
    _, notes = read_document(MODERN, "old.yaml")
    assert "SparseGPT: mask_structure 1:4 dropped 1 of 4; ours is 3:4" in notes
    assert any("names no data" in note for note in notes)
    assert any("gives no epochs" in note for note in notes)
    assert any("mappings is left out" in note for note in notes)
    _, notes = read_document(LEGACY, "old.md")
    assert any("final_lr is left out" in note for note in notes)
    assert any("all Linears become W8A8" in note for note in notes)
    assert read_document("stages: []", "x")[1] == []


def test_loading_logs_the_notes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "paring.recipes"):
        Recipe.parse(MODERN, "old.yaml")
    assert "old.yaml: SparseGPT: mask_structure 1:4 dropped 1 of 4; ours is 3:4" in caplog.messages


def test_a_sparsity_for_each_list_of_layers_becomes_a_modifier_each() -> None:
    text = LEGACY.replace(
        "final_sparsity: 0.8", "final_sparsity: {0.7: [q_proj], 0.8: [mlp.up_proj]}"
    )
    made = [fields(modifier) for modifier in Recipe.parse(text, "x.md").stages[0].modifiers[:2]]
    assert [(m["final_sparsity"], m["targets"]) for m in made] == [
        (0.7, ["q_proj"]),
        (0.8, ["mlp.up_proj"]),
    ]


def test_a_mask_named_by_a_variable_is_turned_too() -> None:
    text = MODERN.replace("ratio: 0.25", "ratio: 0.25\nmask: '1:4'").replace('"1:4"', "eval(mask)")
    assert fields(Recipe.parse(text).stages[0].modifiers[0])["mask_structure"] == "3:4"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("SparseGPTModifier:", "SparseGTPModifier:", "6:5: unknown modifier 'SparseGTP'; did you"),
        ("sequential_update", "quantize", "9:7: unknown key 'quantize' in SparseGPT"),
        ("eval(ratio)", "eval(ratoi)", "7:17: unknown name 'ratoi' in '${ratoi}'; did you"),
        ("eval(ratio)", "eval(__import__('os'))", "7:17: unknown function '__import__'"),
        ("ratio: 0.25", "ratio: 2.5", "7:17: sparsity is too large, got 2.5"),
        ("num_bits: 8", "num_bits: 9", "23:31: num_bits is unknown, got 9; use 4 or 8"),
    ],
)
def test_mistakes_are_placed_in_the_old_file(old: str, new: str, problem: str) -> None:
    (found,) = problems(MODERN.replace(old, new))
    assert problem in found


def test_a_mask_that_is_not_held_has_no_equal() -> None:
    with pytest.raises(RecipeError, match="28:5: unknown key 'leave_enabled'"):
        Recipe.parse(LEGACY.replace("leave_enabled: True", "leave_enabled: False"), "old.md")


@pytest.mark.parametrize(("name", "text"), [("old.md", LEGACY), ("old.yaml", MODERN)])
def test_convert_writes_a_native_recipe_that_means_the_same(
    tmp_path: Path, name: str, text: str
) -> None:
    old, new = tmp_path / name, tmp_path / "new.yaml"
    old.write_text(text)
    done = CliRunner().invoke(application(), ["convert", str(old), "--output", str(new)])
    assert done.exit_code == 0, done.output
    assert "note: it names no data" in done.stderr
    written = new.read_text()
    assert "${" in written  # variables stay variables
    assert "# - it names no data" in written
    assert read_document(written, "new.yaml")[1] == []
    assert Recipe.load(new) == Recipe.load(old)
    again = CliRunner().invoke(application(), ["convert", str(new)])
    assert isinstance(again.exception, RecipeError)
    printed = CliRunner().invoke(application(), ["convert", str(old)])
    assert printed.stdout == written


def test_convert_writes_nothing_when_something_has_no_equal(tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(MODERN.replace("SparseGPTModifier", "AutoRoundModifier"))
    done = CliRunner().invoke(application(), ["convert", str(old), "--output", str(new)])
    assert isinstance(done.exception, RecipeError)
    assert not new.exists()
