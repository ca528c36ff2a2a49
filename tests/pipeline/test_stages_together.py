"""What one stage, or one run, must not leave behind for the next; and what is told before the first begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from paring.errors import DataError, GraphError, ModelError
from paring.modifiers import Session, registry
from paring.pipeline import load_model
from paring.pipeline.apply import apply
from paring.pipeline.lora import adapters
from paring.pipeline.train import check_packing
from paring.recipes import DataConfig, LoraConfig, Recipe, Stage, TrainingConfig
from paring.zoo import sha256_of


def stage(corpus: Path, *modifiers: dict[str, Any], **training: Any) -> Stage:
    """A training stage, or a one-shot stage without `training`."""
    made = [registry()[name](**fields) for each in modifiers for name, fields in each.items()]
    data = DataConfig(dataset=str(corpus / "train.txt"), length=16, samples=16)
    if not training:
        return Stage(run="oneshot", data=data, modifiers=made)
    settings = {"epochs": 1.0, "batch_size": 4, "learning_rate": 1e-3, **training}
    return Stage(run="train", data=data, training=TrainingConfig(**settings), modifiers=made)


def recipe(pico: Path, *stages: Stage) -> Recipe:
    return Recipe(model=str(pico), stages=list(stages))


def test_bf16_ends_with_its_stage(pico: Path, corpus: Path, tmp_path: Path) -> None:
    first, second = stage(corpus, bf16=True), stage(corpus, epochs=2.0)
    made = recipe(pico, first.model_copy(update={"name": "bf16"}), second)
    result = apply(made, output=tmp_path / "out", evaluate=False, verify=True)
    assert result.pared is not None
    model = result.pared.model
    assert "forward" not in vars(model)
    assert model(torch.arange(8)[None]).logits.dtype == torch.float32


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_computes_as_the_model_does(pico: Path, corpus: Path, bf16: bool) -> None:
    distil = {"Distillation": {"teacher": "self"}}
    result = apply(
        recipe(pico, stage(corpus, distil, max_steps=1, bf16=bf16)),
        evaluate=False,
    )
    (step,) = result.report["stages"][0]["log"]
    assert step["loss/kl"] == pytest.approx(0, abs=1e-6)  # nothing has been learned yet


def test_a_recipe_can_be_applied_twice(pico: Path, corpus: Path) -> None:
    fields = {"final_sparsity": 0.5, "ignore": ["lm_head"]}
    made = recipe(pico, stage(corpus, {"MagnitudePruning": fields}, epochs=1.0))
    found = [apply(made, evaluate=False).report["after"]["sparsity"] for _ in range(2)]
    assert found[0] == found[1] > 0.4


@pytest.mark.parametrize("kind", ["MagnitudePruning", "ConstantPruning"])
def test_a_head_tied_to_the_embedding_may_be_pruned(
    pico: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    prune = stage(corpus, {"MagnitudePruning": {"sparsity": 0.5}})
    stages = [prune] if kind == "MagnitudePruning" else [prune, stage(corpus, {kind: {}}, epochs=1)]
    apply(recipe(pico, *stages), output=tmp_path / "out", evaluate=False, verify=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    table = stored["model.embed_tokens.weight"]
    assert float((table == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_constant_pruning_makes_no_mask_where_there_is_no_zero(pico: Path) -> None:
    model, _ = load_model(pico)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 0
    session = Session(model, [registry()["ConstantPruning"](ignore=["lm_head"])])
    session.run_oneshot()
    assert list(session.masks) == [name]


def test_lora_holds_masks_that_its_own_stage_makes(pico: Path) -> None:
    model, _ = load_model(pico)
    session = Session(model, [registry()["MagnitudePruning"](sparsity=0.5, ignore=["lm_head"])])
    ids = torch.arange(12)[None]
    with torch.no_grad(), adapters(model, LoraConfig(), session.masks, seed=0):
        session.run_oneshot()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        trained = model(ids).logits
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert len(session.masks) == 14


def test_a_fingerprint_sees_the_middle_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"w": torch.zeros(2**20)}
    save_file(tensors, file)
    before = sha256_of(file)
    tensors["w"][2**19] = 1
    save_file(tensors, file)
    assert sha256_of(file) != before


def test_a_loss_that_is_no_number_ends_the_run(pico: Path, corpus: Path) -> None:
    with pytest.raises(ModelError, match="the loss is nan at optimizer step .*lower learning_rate"):
        apply(recipe(pico, stage(corpus, epochs=4, learning_rate=1e20)), evaluate=False)


def test_what_is_kept_stays_on_its_integer_grid(pico: Path, corpus: Path) -> None:
    """OBSPruning would compensate in the weights that are left; after Quantization's end those are integers."""
    quantize = {"Quantization": {"end": 2, "ignore": ["lm_head"]}}
    prune = {"OBSPruning": {"final_sparsity": 0.5, "ignore": ["lm_head"]}}
    result = apply(recipe(pico, stage(corpus, quantize, prune, epochs=4)), evaluate=False)
    assert result.pared is not None
    for name, layer in result.pared.quantization.items():
        weight = result.pared.model.get_submodule(name).weight.detach()
        integers = weight / layer.scale.reshape(-1, 1)
        assert float((integers - integers.round()).abs().max()) < 1e-3, name


def test_packing_is_refused_where_sequences_would_see_each_other(pico: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    check_packing(LlamaForCausalLM(LlamaConfig(intermediate_size=64, **sizes)).eval())
    model = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes)).eval()
    with pytest.raises(ModelError, match="OPTForCausalLM lets a sequence see .*remove packing"):
        check_packing(model)


def test_files_that_a_later_stage_needs_are_missed_before_the_first(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    prune = stage(corpus, {"MagnitudePruning": {"sparsity": 0.5, "ignore": ["lm_head"]}})
    teach = stage(corpus, {"Distillation": {"teacher": str(tmp_path / "nobody")}}, epochs=1)
    with pytest.raises(ModelError, match="nobody: no such folder"):
        apply(recipe(pico, prune, teach), output=tmp_path / "a", evaluate=False)
    later = stage(corpus, epochs=1)
    assert later.data is not None
    later.data.dataset = str(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="no such file"):
        apply(recipe(pico, prune, later), output=tmp_path / "b", evaluate=False)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_model_that_the_engine_does_not_know_is_refused_before_the_work(
    corpus: Path, tokenizer: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    model = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **sizes))
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    prune = stage(corpus, {"MagnitudePruning": {"sparsity": 0.5, "ignore": ["lm_head"]}})
    made = recipe(tmp_path / "opt", prune)
    with pytest.raises(GraphError, match="'OPTForCausalLM' is not known to the engine"):
        apply(made, output=tmp_path / "out", evaluate=False)
    assert json.loads((tmp_path / "out/.paring/run.json").read_text())["stages"] == []
    assert apply(made, evaluate=False).report["after"]["sparsity"] > 0.2  # in memory it works


def test_groups_that_the_engine_cannot_decode_are_refused_before_the_work(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    quantize = stage(
        corpus, {"Quantization": {"scheme": "W4A8", "group_size": 16, "ignore": ["lm_head"]}}
    )
    with pytest.raises(GraphError, match="Quantization has group_size 16; the engine .* 32, 64"):
        apply(recipe(pico, quantize), output=tmp_path / "out", evaluate=False)


def test_reporters_are_known_before_the_first_stage(pico: Path, corpus: Path) -> None:
    with pytest.raises(ModelError, match="report_to: csv is not known; use .*tensorboard"):
        apply(recipe(pico, stage(corpus, report_to=["csv"])), evaluate=False)


def test_tensorboard_gets_every_step_and_its_files_stay(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    made = recipe(pico, stage(corpus, report_to=["tensorboard"]))
    apply(made, output=tmp_path / "out", evaluate=False)
    events = list((tmp_path / "out" / "runs" / made.stages[0].name).glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert events[0].read_bytes().count(b"train/loss") >= 4
