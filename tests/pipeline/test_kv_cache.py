"""A checkpoint calibrated for an int8 cache: `transformers` computes the same, the graph carries the scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from paring.cli import application
from paring.engine import Engine
from paring.engine.export import export
from paring.engine.graph import Attention
from paring.engine.graph_file import read_graph
from paring.errors import GraphError
from paring.modifiers import registry
from paring.pipeline.apply import apply
from paring.pipeline.pared import Pared
from paring.recipes import DataConfig, Recipe, Stage

TOKENS = [(7 * i) % 50 for i in range(40)]


@pytest.fixture
def made(pico: Path, corpus: Path, tmp_path: Path) -> tuple[Path, Pared]:
    modifier = registry()["Quantization"](scheme="W8A16", kv_cache="int8", ignore=["lm_head"])
    data = DataConfig(dataset=str(corpus / "train.txt"), length=32, samples=8)
    stages = [Stage(run="oneshot", data=data, modifiers=[modifier])]
    pared = apply(
        Recipe(model=str(pico), stages=stages), output=tmp_path / "out", evaluate=False
    ).pared
    assert pared is not None
    return tmp_path / "out", pared


def test_transformers_computes_the_same(made: tuple[Path, Pared]) -> None:
    folder, pared = made
    tokens = torch.tensor([TOKENS])
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = pared.model(tokens).logits
        assert torch.allclose(stored(tokens).logits, expected, atol=1e-5)
        for cache in pared.caches.values():
            cache.detach()
        assert not torch.allclose(stored(tokens).logits, pared.model(tokens).logits, atol=1e-3)
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert scheme["kv_cache_scheme"]["strategy"] == "attn_head"


def test_the_graph_carries_the_scales_and_the_engine_says_that_it_does_not_use_them(
    made: tuple[Path, Pared],
) -> None:
    folder, pared = made
    graph = read_graph(folder / "graph")
    attentions = [op for op in graph.ops if isinstance(op, Attention)]
    for op, cache in zip(attentions, pared.caches.values(), strict=True):
        for name, scale in ((op.k_scale, cache.key_scale), (op.v_scale, cache.value_scale)):
            np.testing.assert_array_equal(graph.arrays[f"{name}/values"], scale.numpy())
    for cache in pared.caches.values():
        cache.detach()
    with torch.inference_mode():
        expected = pared.model(torch.tensor([TOKENS])).logits[0].numpy()
    with Engine(graph, threads=1, cache="f32") as engine:
        found = engine.info()["cache"]
        assert (found["type"], found["calibrated"]) == ("f32", "int8")
        difference = np.abs(engine.logits(TOKENS) - expected).max()
    assert difference <= 1e-3 * np.abs(expected).max()


def test_export_says_that_the_engine_does_not_use_them(
    made: tuple[Path, Pared], tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        application(), ["export", str(made[0]), "--output", str(tmp_path / "graph")]
    )
    assert result.exit_code == 0, result.output
    assert "does not use them yet" in result.output


def test_one_scale_per_tensor_is_repeated(made: tuple[Path, Pared], tmp_path: Path) -> None:
    folder, _ = made
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        tensors[name] = torch.tensor([0.25])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
    (folder / "config.json").write_text(json.dumps(config))
    graph = read_graph(export(folder, tmp_path / "graph"))
    op = next(op for op in graph.ops if isinstance(op, Attention))
    assert graph.arrays[f"{op.k_scale}/values"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("key", "value"), [("num_bits", 4), ("type", "float"), ("dynamic", True), ("symmetric", False)]
)
def test_another_kind_of_cache_is_refused(
    made: tuple[Path, Pared], tmp_path: Path, key: str, value: object
) -> None:
    folder, _ = made
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError, match=key):
        export(folder, tmp_path / "graph")
