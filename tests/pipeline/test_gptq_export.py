"""What GPTQ makes is written, read back by `transformers`, and run by the engine as the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from paring.engine import Engine
from paring.engine.graph import Matrix
from paring.engine.graph_file import read_graph
from paring.engine.storage import unpack, unpack_mask
from paring.modifiers import registry
from paring.pipeline.apply import apply
from paring.pipeline.pared import Pared
from paring.recipes import DataConfig, Recipe, Stage

TOKENS = [(7 * i) % 50 for i in range(40)]
SCHEMES: list[dict[str, Any]] = [
    {"scheme": "W8A8"},
    {"scheme": "W8A8", "dynamic": False, "input_observer": "mse"},
    {"scheme": "W4A16", "group_size": 32, "observer": "mse"},
    {"scheme": "W4A8", "group_size": 32, "actorder": None},
]


def applied(modifiers: list[Any], pico: Path, corpus: Path, output: Path) -> tuple[Pared, Any]:
    """The model in memory, and as `transformers` reads it from `output`."""
    data = DataConfig(dataset=str(corpus / "train.txt"), length=32, samples=8)
    stage = Stage(run="oneshot", data=data, modifiers=modifiers)
    recipe = Recipe(model=str(pico), stages=[stage])
    pared = apply(recipe, output=output, evaluate=False).pared
    assert pared is not None
    return pared, AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("settings", SCHEMES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_engine_runs_what_gptq_made(
    pico: Path, corpus: Path, tmp_path: Path, settings: dict[str, Any], sparse: bool
) -> None:
    known = registry()
    modifiers = [known["GPTQ"](ignore=["lm_head"], **settings)]
    if sparse:
        modifiers.insert(0, known["SparseGPT"](sparsity=0.5, ignore=["lm_head"]))
    pared, stored = applied(modifiers, pico, corpus, tmp_path / "out")
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        expected = pared.model(tokens).logits[0]
        read_back = stored(tokens).logits[0]
    assert (read_back - expected).abs().max() <= 1e-5 * expected.abs().max()

    graph = read_graph(tmp_path / "out" / "graph")
    for name, layer in pared.quantization.items():
        matrix = graph.tensors[f"{name}.weight"]
        parts = graph.parts(f"{name}.weight")
        assert isinstance(matrix, Matrix)
        assert matrix.dtype == ("i8" if layer.weight_bits == 8 else "i4")
        integers = layer.quantized_weight.numpy()
        np.testing.assert_array_equal(unpack(matrix, parts), integers)
        np.testing.assert_array_equal(parts["scales"], layer.scale.numpy())
        if matrix.storage == "bitmask":
            assert sparse
            held = unpack_mask(parts["mask"], matrix.shape[1])
            np.testing.assert_array_equal(held, pared.masks[f"{name}.weight"].numpy())
    with Engine(graph, threads=1, cache="f32") as engine:
        logits = engine.logits(TOKENS)
    difference = np.linalg.norm(logits - expected.numpy(), axis=1)
    difference /= np.linalg.norm(expected.numpy(), axis=1)
    # Sums in another order may take another integer where an activation is halfway between two, and then one more in
    # every layer and token after that.
    assert np.median(difference) < (1e-3 if settings["scheme"] == "W4A16" else 3e-2)


@pytest.mark.parametrize("modifier", ["GPTQ", "Quantization"])
def test_the_engine_keeps_scales_of_groups_in_float16(
    pico: Path, corpus: Path, tmp_path: Path, modifier: str
) -> None:
    settings = {"scheme": "W4A16", "group_size": 64, "ignore": ["lm_head"]}
    pared, _ = applied([registry()[modifier](**settings)], pico, corpus, tmp_path / "out")
    with Engine(read_graph(tmp_path / "out" / "graph"), threads=1) as engine:
        matrices = engine.info()["matrices"]
    for name, layer in pared.quantization.items():
        n, groups = layer.scale.shape
        if groups > 1:
            assert torch.equal(layer.scale, layer.scale.half().float())
        # of 16 rows: the scales, those of groups in halves, and row sums
        header = (64 if groups == 1 else 32 * groups) + 64
        size = 64 * groups * n // 2 + n // 16 * header
        assert matrices[f"{name}.weight"]["bytes"] == size
    assert pared.quantization["model.layers.0.mlp.down_proj"].scale.shape == (64, 2)


def test_a_quantized_head_parts_from_the_embedding_in_checkpoint_and_graph(
    pico: Path, corpus: Path, tmp_path: Path
) -> None:
    known = registry()
    modifiers = [
        known["GPTQ"](scheme="W4A8", group_size=32, ignore=["lm_head"]),
        known["HeadGPTQ"](group_size=32),
    ]
    pared, stored = applied(modifiers, pico, corpus, tmp_path / "out")
    tokens = torch.tensor([TOKENS])
    dense = AutoModelForCausalLM.from_pretrained(pico).get_input_embeddings().weight
    with torch.inference_mode():
        expected = pared.model(tokens).logits[0]
        read_back = stored(tokens).logits[0]
    assert (read_back - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(stored.get_input_embeddings().weight, dense)
    assert torch.equal(pared.model.get_input_embeddings().weight, dense)

    graph = read_graph(tmp_path / "out" / "graph")
    matrix = graph.tensors["lm_head.weight"]
    assert isinstance(matrix, Matrix)
    assert (matrix.dtype, matrix.group) == ("i4", 32)
    layer = pared.quantization["lm_head"]
    np.testing.assert_array_equal(
        unpack(matrix, graph.parts("lm_head.weight")), layer.quantized_weight.numpy()
    )
    np.testing.assert_array_equal(
        unpack(
            graph.tensors["model.embed_tokens.weight"], graph.parts("model.embed_tokens.weight")
        ),
        dense.detach().numpy(),
    )
    with Engine(graph, threads=1, cache="f32") as engine:
        logits = engine.logits(TOKENS)
    difference = np.linalg.norm(logits - expected.numpy(), axis=1)
    assert np.median(difference / np.linalg.norm(expected.numpy(), axis=1)) < 3e-2
