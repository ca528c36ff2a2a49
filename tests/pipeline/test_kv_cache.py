"""A checkpoint calibrated for an int8 cache: what is loaded computes the same, the engine too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paring.engine import Engine
from paring.engine.export import export
from paring.engine.graph import Attention
from paring.engine.graph_file import read_graph
from paring.engine.packing import KvType
from paring.errors import GraphError
from paring.modifiers import registry
from paring.pipeline.apply import apply
from paring.pipeline.models import load_model
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


def test_a_loaded_checkpoint_computes_the_same(made: tuple[Path, Pared]) -> None:
    folder, pared = made
    tokens = torch.tensor([TOKENS])
    stored, _ = load_model(folder)
    with torch.inference_mode():
        expected = pared.model(tokens).logits
        assert torch.allclose(stored(tokens).logits, expected, atol=1e-5)
        for cache in pared.caches.values():
            cache.detach()
        assert not torch.allclose(stored(tokens).logits, pared.model(tokens).logits, atol=1e-3)
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert scheme["kv_cache_scheme"]["strategy"] == "attn_head"


def test_the_engine_keeps_keys_and_values_by_the_scales_of_the_graph(
    made: tuple[Path, Pared],
) -> None:
    folder, pared = made
    graph = read_graph(folder / "graph")
    attentions = [op for op in graph.ops if isinstance(op, Attention)]
    for op, cache in zip(attentions, pared.caches.values(), strict=True):
        for name, scale in ((op.k_scale, cache.key_scale), (op.v_scale, cache.value_scale)):
            np.testing.assert_array_equal(graph.arrays[f"{name}/values"], scale.numpy())
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        rounded = pared.model(tokens).logits[0].numpy()
        for cache in pared.caches.values():
            cache.detach()
        plain = pared.model(tokens).logits[0].numpy()

    def distance(cache: KvType, expected: np.ndarray) -> float:
        with Engine(graph, threads=1, cache=cache) as engine:
            info = engine.info()["cache"]
            kept = "int8" if cache == "auto" else cache
            assert (info["type"], info["calibrated"]) == (kept, "int8")
            found = engine.logits(TOKENS)
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    assert distance("f32", plain) <= 1e-3
    # The 15-bit activations of W8A16 make some keys and values round the other way.
    assert 3 * distance("auto", rounded) <= distance("auto", plain)


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
