"""What the pipeline writes, `transformers` reads back as the same model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from paring.errors import ModelError
from paring.modifiers import registry
from paring.pipeline.apply import apply
from paring.pipeline.checkpoint import publish, read_masks, verify_checkpoint
from paring.pipeline.models import load_model
from paring.pipeline.pared import Pared
from paring.recipes import DataConfig, Recipe, Stage

SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8"},
    "W8A8-static": {"scheme": "W8A8", "dynamic": False},
    "W8A16": {"scheme": "W8A16"},
    "W4A16": {"scheme": "W4A16", "group_size": 32},
    "W4A8": {"scheme": "W4A8", "group_size": 32},
    "skip": {"scheme": "W8A8", "skip": {"by": "input_range", "top": 3}},
    "mixed": {
        "config_groups": {
            "attention": {
                "targets": ["re:.*self_attn.*"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            },
            "mlp": {"targets": ["re:.*mlp.*"], "weights": {}, "input_activations": {}},
        }
    },
    "float": {},
}
CASES = [
    *((False, name) for name in ("W8A8", "W8A8-static", "W8A16", "W4A16", "W4A8")),
    *((True, name) for name in ("W8A8", "W8A8-static", "W4A16", "skip", "mixed", "float")),
]


def recipe(pico: Path, corpus: Path, sparse: bool, scheme: dict[str, Any]) -> Recipe:
    known = registry()
    modifiers = []
    if sparse:
        modifiers.append(known["SparseGPT"](sparsity=0.5, ignore=["lm_head"]))
    if scheme:
        modifiers.append(known["Quantization"](ignore=["lm_head"], **scheme))
    data = DataConfig(dataset=str(corpus / "train.txt"), length=32, samples=8)
    return Recipe(model=str(pico), stages=[Stage(run="oneshot", data=data, modifiers=modifiers)])


def made(pico: Path, corpus: Path, output: Path, sparse: bool, name: str) -> Pared:
    result = apply(recipe(pico, corpus, sparse, SCHEMES[name]), output=output, evaluate=False)
    assert result.pared is not None
    return result.pared


@pytest.mark.parametrize(("sparse", "name"), CASES)
def test_transformers_loads_the_model_that_was_in_memory(
    pico: Path, corpus: Path, tmp_path: Path, name: str, sparse: bool
) -> None:
    pared = made(pico, corpus, tmp_path / "out", sparse, name)
    tokens = torch.arange(64).view(2, 32) * 3
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        expected = pared.model(tokens).logits
        difference = (stored(tokens).logits - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


def test_what_lies_in_the_file(pico: Path, corpus: Path, tmp_path: Path) -> None:
    pared = made(pico, corpus, tmp_path / "out", True, "mixed")
    q_proj, down = (f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.down_proj"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping) tied: stored once
        assert file.get_tensor(f"{q_proj}.weight_packed").dtype == torch.int32
        assert file.get_tensor(f"{q_proj}.weight_packed").shape == (64, 8)
        assert file.get_tensor(f"{q_proj}.weight_shape").tolist() == [64, 64]
        assert file.get_tensor(f"{q_proj}.weight_scale").shape == (64, 2)
        integers = file.get_tensor(f"{down}.weight")
        scale = file.get_tensor(f"{down}.weight_scale")
    assert integers.dtype == torch.int8
    assert scale.shape == (64, 1)
    memory = pared.model.get_parameter(f"{down}.weight")
    assert torch.equal(integers * scale, memory)
    assert not integers[~pared.masks[f"{down}.weight"]].any()
    modes = {file.stat().st_mode for file in (tmp_path / "out").glob("*.*") if file.is_file()}
    assert len(modes) == 1  # the weights are as readable as the rest
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head"]
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_layers_that_are_skipped_stay_in_float(pico: Path, corpus: Path, tmp_path: Path) -> None:
    pared = made(pico, corpus, tmp_path / "out", True, "skip")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    skipped = report["stages"][0]["modifiers"]["Quantization"]["skipped"]
    assert len(skipped) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == sorted(["lm_head", *skipped])
    schemes = {entry["name"]: entry["scheme"] for entry in report["layers"]}
    assert {name for name, scheme in schemes.items() if scheme == "float"} == set(skipped)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in schemes:
            weight = file.get_tensor(f"{name}.weight")
            assert (weight.dtype == torch.float32) == (name in skipped)
            if name in skipped:
                assert torch.equal(weight, pared.model.get_parameter(f"{name}.weight"))


def test_masks_are_stored_bit_by_bit_and_held_when_the_model_is_pared_again(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    first = made(pico, corpus, tmp_path / "sparse", True, "float")
    stored = read_masks(tmp_path / "sparse", first.model)
    assert stored.keys() == set(first.masks)
    for name, mask in stored.items():
        assert torch.equal(mask, first.masks[name])
    with np.load(tmp_path / "sparse" / "pruning_masks.npz") as file:
        name = "model.layers.0.self_attn.q_proj.weight"
        expected = np.packbits(first.masks[name].numpy(), axis=1, bitorder="little")
        assert np.array_equal(file[name], expected)
    second = made(tmp_path / "sparse", corpus, tmp_path / "both", False, "W8A8")
    for name, mask in second.masks.items():
        assert torch.equal(mask, first.masks[name])
        assert not second.model.get_parameter(name)[~mask].any()


def test_masks_of_another_model_are_refused(pico: Path, tmp_path: Path) -> None:
    model, _ = load_model(pico)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.savez(tmp_path / "pruning_masks.npz", **{name: np.zeros((64, 9), np.uint8)})
    with pytest.raises(ModelError, match="q_proj.weight does not fit the model"):
        read_masks(tmp_path, model)


def test_a_quantized_checkpoint_is_loaded_as_it_computes_or_as_plain_floats(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    pared = made(pico, corpus, tmp_path / "out", False, "W8A8-static")
    name = "model.layers.0.mlp.up_proj.weight"
    tokens = torch.arange(32)[None] * 7
    plain, _ = load_model(tmp_path / "out", dequantize=True)
    assert torch.equal(plain.get_parameter(name), pared.model.get_parameter(name))
    plain.save_pretrained(tmp_path / "plain")  # nothing in the way of further work
    exact, _ = load_model(tmp_path / "out")
    with torch.inference_mode():
        expected = pared.model(tokens).logits
        torch.testing.assert_close(exact(tokens).logits, expected, rtol=0, atol=1e-4)
        assert not torch.allclose(plain(tokens).logits, expected, rtol=0, atol=1e-3)


def test_verifying_finds_a_wrong_weight(pico: Path, corpus: Path, tmp_path: Path) -> None:
    pared = made(pico, corpus, tmp_path / "out", False, "W8A8")
    assert verify_checkpoint(tmp_path / "out", pared.model) < 1e-4
    pared.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0] += 1
    with pytest.raises(ModelError, match="logits differ"):
        verify_checkpoint(tmp_path / "out", pared.model)


def test_publishing_stopped_anywhere_never_leaves_what_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    names = ["config.json", "graph", "model.safetensors", "recipe.yaml"]

    def stage(content: str) -> Path:
        staged = output / ".paring" / "result"
        (staged / "graph").mkdir(parents=True)
        (staged / "graph" / "graph.json").write_text(content)
        for name in ("config.json", "model.safetensors", "recipe.yaml"):
            (staged / name).write_text(content)
        return staged

    publish(stage("old"), output, [])
    replace, stopped = os.replace, RuntimeError("power cut")
    for moves in range(4):
        staged = stage("new")
        left = iter(range(moves))

        def some(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise stopped
            replace(source, target)

        monkeypatch.setattr(os, "replace", some)
        with pytest.raises(RuntimeError, match="power cut"):
            publish(staged, output, names)
        assert not (output / "config.json").exists()
        monkeypatch.setattr(os, "replace", replace)
        shutil.rmtree(staged)
    publish(stage("new"), output, names)
    assert sorted(path.name for path in output.iterdir()) == [".paring", *names]
    assert {path.read_text() for path in output.rglob("*.*") if path.is_file()} == {"new"}
