"""Every recipe of the library runs on a pico model, with all of its stages and little of its data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paring.pipeline.apply import apply
from paring.recipes import DataConfig, Recipe
from paring.recipes.library import entries

NAMES = [entry.name for entry in entries()]


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, and Linears wide enough for every pattern of zeros."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("library")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(recipe: Recipe, model: Path, corpus: Path) -> Recipe:
    """The recipe with a pico model as base and teacher, a few sequences of local text, and few steps."""

    def data(config: DataConfig) -> DataConfig:
        changed = config.model_copy(update={"samples": 8, "length": 32, "split": "train"})
        for part in (changed, *(changed.mixture or [])):
            if part.dataset:
                part.dataset = str(corpus / ("sums.jsonl" if part.has_answers else "train.txt"))
            part.text = None
        return changed

    recipe = recipe.model_copy(deep=True, update={"model": str(model), "evaluate": None})
    for stage in recipe.stages:
        if stage.data is not None:
            stage.data = data(stage.data)
        if stage.training is not None:
            few: dict[str, Any] = {"batch_size": 2, "warmup_steps": 1, "max_steps": 24}
            stage.training = stage.training.model_copy(update=few)
        for modifier in stage.modifiers:
            if getattr(modifier, "teacher", "self") != "self":
                modifier.teacher = str(model)  # type: ignore[attr-defined]
            if hasattr(modifier, "multiple_of"):  # of heads or channels; a pico model has few
                modifier.multiple_of = 8
    return recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_library_recipe_runs(name: str, model: Path, corpus: Path) -> None:
    recipe = small(Recipe.load(name), model, corpus)
    result = apply(recipe, evaluate=False)
    assert result.pared is not None
    with torch.inference_mode():
        assert result.pared.model(torch.arange(20)[None]).logits.isfinite().all()
    for parameter, mask in result.pared.masks.items():
        assert not result.pared.model.get_parameter(parameter)[~mask].any()
    for entry in result.report["stages"]:
        assert all(math.isfinite(step["loss"]) for step in entry.get("log", []))
    sparsity = recipe.args.get("sparsity")
    if sparsity and "llmpruner" not in name:
        assert result.report["after"]["sparsity"] == pytest.approx(sparsity, abs=0.03)
