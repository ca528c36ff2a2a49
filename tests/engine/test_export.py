from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico_checkpoints import SCHEMES, VOCABULARY, quantize, write_llama
from reference_interpreter import logits, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from paring.engine import Engine
from paring.engine.export import export
from paring.engine.graph import Activation, Graph, Head, Matrix
from paring.engine.graph_file import read_graph
from paring.engine.storage import unpack, unpack_mask
from paring.errors import GraphError

TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 24).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def torch_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def assert_same_logits(graph: Graph, folder: Path, tolerance: float = 1e-5) -> None:
    expected = torch_logits(folder)
    found = logits(graph, TOKENS)
    assert np.abs(expected).max() > 1  # else this would compare nothing with nothing
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24, "hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu", "num_key_value_heads": 1},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ],
    ids=str,
)
def test_float_model_computes_the_same_logits(
    llama: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = llama(**changes)
    assert_same_logits(read_graph(export(folder)), folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_model_computes_the_same_logits(
    quantized: Callable[..., Path], scheme: str
) -> None:
    folder = quantized(scheme)
    graph = read_graph(export(folder))
    # Where an activation lies on a rounding boundary, another order of float sums takes another
    # integer; that is one step of one input, and it moves a logit by far less than this.
    assert_same_logits(graph, folder, 1e-5 if "a16" in scheme else 5e-3)


def test_quantized_linears_are_stored_as_the_scheme_says(quantized: Callable[..., Path]) -> None:
    expected = {
        "w8a8": ("i8", "dense", 0, Activation(bits=8, dynamic=True)),
        "w8a8-sparse": ("i8", "bitmask", 0, Activation(bits=8, dynamic=True)),
        "w8a8-static": ("i8", "dense", 0, Activation(bits=8, dynamic=False)),
        "w8a16": ("i8", "dense", 0, Activation(bits=16)),
        "w4a16-g32": ("i4", "dense", 32, Activation(bits=16)),
        "w4a16-g32-sparse": ("i4", "bitmask", 32, Activation(bits=16)),
    }
    for scheme, (dtype, storage, group, activation) in expected.items():
        graph = read_graph(export(quantized(scheme)))
        matrix = graph.tensors["model.layers.1.mlp.down_proj.weight"]
        assert isinstance(matrix, Matrix)
        found = (matrix.dtype, matrix.storage, matrix.group, matrix.activation)
        assert found == (dtype, storage, group, activation), scheme
        assert weights(graph, "model.embed_tokens.weight").shape == (VOCABULARY, 64)


@pytest.mark.parametrize("scheme", ["w8a8-sparse", "w4a16-g32-sparse"])
def test_stored_mask_is_the_pruning_mask_to_the_weight(
    quantized: Callable[..., Path], scheme: str
) -> None:
    folder = quantized(scheme)
    graph = read_graph(export(folder))
    rounded_to_zero = 0
    with np.load(folder / "pruning_masks.npz") as masks:
        assert len(masks) == 14
        for name in masks:
            matrix, parts = graph.tensors[name], graph.parts(name)
            assert isinstance(matrix, Matrix)
            np.testing.assert_array_equal(parts["mask"], masks[name])
            kept = unpack_mask(masks[name], matrix.shape[1])
            assert matrix.nonzeros == kept.sum()
            rounded_to_zero += int((unpack(matrix, parts)[kept] == 0).sum())
    assert rounded_to_zero > 0  # and yet they count as kept


def test_without_masks_the_nonzeros_are_kept(quantized: Callable[..., Path]) -> None:
    folder = quantized("w8a8-sparse")
    (folder / "pruning_masks.npz").unlink()
    graph = read_graph(export(folder))
    matrix = graph.tensors["model.layers.0.self_attn.q_proj.weight"]
    values = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(matrix, Matrix)
    assert matrix.nonzeros == int(values.count_nonzero())


def test_tied_head_is_stored_once(llama: Callable[..., Path]) -> None:
    graph = read_graph(export(llama()))
    assert isinstance(graph.ops[-1], Head)
    assert graph.ops[-1].weight == "model.embed_tokens.weight"
    assert "lm_head.weight" not in graph.tensors


@pytest.mark.parametrize(
    ("head", "dtype", "tolerance"), [("f16", "f16", 1e-3), ("int8", "i8", 2e-2)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_head_copy(
    llama: Callable[..., Path], head: Any, dtype: str, tolerance: float, tied: bool
) -> None:
    folder = llama(tie_word_embeddings=tied)
    graph = read_graph(export(folder, head=head))
    stored, embedding = graph.tensors["lm_head.weight"], graph.tensors["model.embed_tokens.weight"]
    assert isinstance(stored, Matrix)
    assert isinstance(embedding, Matrix)
    assert (stored.dtype, embedding.dtype) == (dtype, "f32")
    assert_same_logits(graph, folder, tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["keep", "f16", "int8"])
@pytest.mark.parametrize(("embedding", "dtype"), [("f16", "f16"), ("int8", "i8")])
def test_stored_embedding(
    llama: Callable[..., Path], embedding: Any, dtype: str, head: Any, tied: bool
) -> None:
    folder = llama(tie_word_embeddings=tied)
    graph = read_graph(export(folder, head=head, embedding=embedding))
    name = "model.embed_tokens.weight"
    stored, values = graph.tensors[name], weights(graph, name)
    assert isinstance(stored, Matrix)
    assert (stored.dtype, stored.storage, stored.group) == (dtype, "dense", 0)
    original = load_file(folder / "model.safetensors")[name].numpy()
    step = np.abs(original).max(axis=1, keepdims=True) / 127.5
    assert np.abs(values - original).max() <= (step.max() / 2 * 1.001 if dtype == "i8" else 1e-3)
    assert ("lm_head.weight" not in graph.tensors) == (tied and head == embedding)
    expected = logits(graph, TOKENS)
    for kernels in ("auto", "reference"):
        with Engine(graph, threads=1, kernels=kernels, cache="f32") as engine:
            difference = np.abs(engine.logits(TOKENS) - expected).max()
        # The inputs of an int8 head have 15 bits.
        assert difference <= (1e-3 if head == "int8" else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(llama: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = llama()
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    graph = read_graph(export(folder))
    matrix = graph.tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(matrix, Matrix)
    assert matrix.dtype == ("f16" if dtype == torch.float16 else "f32")
    assert_same_logits(graph, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", ["keep", "f16", "int8"])
def test_engine_runs_pruned_floats(
    llama: Callable[..., Path], dtype: torch.dtype, head: Any
) -> None:
    folder = llama()
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        kept = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(1)) < 0.4
        tensors[name] = (tensors[name] * kept).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    graph = read_graph(export(folder, head=head))
    matrix = graph.tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(matrix, Matrix)
    assert matrix.nonzeros == int(tensors["model.layers.0.mlp.up_proj.weight"].count_nonzero())
    expected = logits(graph, TOKENS)
    with Engine(graph, threads=1) as engine:
        difference = np.abs(engine.logits(TOKENS) - expected).max()
    # With an int8 head keys and values are kept in f16, and the head's inputs have 15 bits.
    assert difference <= (1e-3 if head == "int8" else 1e-5) * np.abs(expected).max()


def test_sharded_checkpoint(llama: Callable[..., Path]) -> None:
    folder = llama()
    whole = export(folder, folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    shards = export(folder, folder / "shards")
    assert (shards / "graph.safetensors").read_bytes() == (whole / "graph.safetensors").read_bytes()


def test_mistral(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        sliding_window=None,
        initializer_range=0.15,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    assert_same_logits(read_graph(export(tmp_path)), tmp_path)
    _edit(tmp_path / "config.json", sliding_window=16)
    with pytest.raises(GraphError, match="sliding_window"):
        export(tmp_path)


def test_tokenizer_and_sampling_settings_travel_along(llama: Callable[..., Path]) -> None:
    folder = llama()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"eos_token_id": [2, 5], "bos_token_id": 1, "temperature": 0.5, "x": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    graph = read_graph(export(folder))
    assert graph.tokenizer is not None
    assert (graph.tokenizer.bos, graph.tokenizer.eos) == (1, (2, 5))
    assert graph.tokenizer.chat_template == "{{ messages }}"
    assert graph.generation == {"temperature": 0.5}
    assert graph.folder is not None
    original = (folder / "tokenizer.json").read_bytes()
    assert (graph.folder / graph.tokenizer.file).read_bytes() == original


def test_same_checkpoint_same_bytes(llama: Callable[..., Path]) -> None:
    folder = llama()
    first, second = export(folder, folder / "a"), export(folder, folder / "b")
    for name in ("graph.json", "graph.safetensors", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"hidden_act": "mish"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"sliding_window": 16},
        {"num_attention_heads": 8},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"hidden_size": "64"},
        {"rms_norm_eps": None},
        {"vocab_size": 64},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {"config_groups": {"g": {"targets": ["Linear"], "weights": {}}}}},
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused(
    llama: Callable[..., Path], change: dict[str, Any]
) -> None:
    folder = llama(num_hidden_layers=2)
    _edit(folder / "config.json", **change)
    with pytest.raises(GraphError):
        export(folder)
    assert not (folder / "graph").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("symmetric", False),
        ("num_bits", 3),
        ("type", "float"),
        ("strategy", "block"),
        ("num_bits", 4),
        ("group_size", 32),
        ("dynamic", True),
    ],
)
def test_other_weight_quantization_is_refused(
    quantized: Callable[..., Path], key: str, value: Any
) -> None:
    folder = quantized("w8a8")
    config = json.loads((folder / "config.json").read_text())
    arguments = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    arguments[key] = value
    if key == "group_size":
        arguments["strategy"] = "group"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError):
        export(folder)


def _edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model__layers__0__self_attn__q_proj__"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q + "weight_zero_point": torch.ones(64, 1, dtype=torch.int8)}, "zero points"),
        ({Q + "weight_g_idx": torch.arange(64).flip(0) // 32}, "activation order"),
        ({Q + "weight_scale": None}, "weight_scale"),
        ({Q + "weight_scale": torch.ones(3)}, "3 scales"),
        ({Q + "weight_scale": torch.full((64, 1), torch.nan)}, "not all finite"),
        ({Q + "weight": torch.ones(64, 64)}, "floating point"),
        ({Q + "weight": None}, "q_proj"),
        ({Q + "bias": torch.ones(64)}, "q_proj.bias"),
        ({"model__norm__weight": torch.full((64,), torch.inf)}, "not all values are finite"),
        ({"model__norm__weight": torch.ones(65)}, "not a vector of 64"),
        ({"lm_head__weight": torch.ones(VOCABULARY, 64)}, "another matrix"),
        (
            {"model__embed_tokens__weight": torch.full((VOCABULARY, 64), torch.nan)},
            "not all weights",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_are_refused(
    quantized: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = quantized("w8a8")
    _edit_tensors(folder, **changes)
    with pytest.raises(GraphError, match=message):
        export(folder)
    assert not (folder / "graph").exists()


def test_masks_that_do_not_fit_are_refused(quantized: Callable[..., Path]) -> None:
    folder = quantized("w8a8-sparse")
    path = folder / "pruning_masks.npz"
    with np.load(path) as stored:
        masks = dict(stored)
    name = "model.layers.0.mlp.up_proj.weight"
    for changed, message in (
        ({**masks, name: np.zeros_like(masks[name])}, "drops weights"),
        ({**masks, name: masks[name][:, 1:]}, "does not fit"),
        ({**masks, "model.other.weight": masks[name]}, "no weight"),
    ):
        np.savez(path, **changed)
        with pytest.raises(GraphError, match=message):
            export(folder)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(GraphError, match="can't be read"):
        export(folder)


def test_identity_group_index_and_zero_zero_points_are_accepted(
    quantized: Callable[..., Path],
) -> None:
    folder = quantized("w4a16-g32")
    before = (export(folder) / "graph.safetensors").read_bytes()
    _edit_tensors(
        folder,
        **{
            Q + "weight_g_idx": torch.arange(64) // 32,
            Q + "weight_zero_point": torch.zeros(64, 2, dtype=torch.int8),
        },
    )
    assert (export(folder) / "graph.safetensors").read_bytes() == before


def test_replaces_a_graph_but_no_other_folder(llama: Callable[..., Path]) -> None:
    folder = llama()
    export(folder)
    export(folder, head="f16")
    assert "lm_head.weight" in read_graph(folder).tensors
    names = set(os.listdir(folder))
    with pytest.raises(GraphError, match="which is no part of a graph"):
        export(folder, folder)
    assert set(os.listdir(folder)) == names
    (folder / "graph" / "README.md").write_text("mine")
    with pytest.raises(GraphError, match=r"graph: has 'README.md', which .* would be lost"):
        export(folder)
    assert (folder / "graph" / "README.md").read_text() == "mine"
    assert not [name for name in names if name.startswith(".")]


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"config\.json"):
        export(tmp_path)
    with pytest.raises(GraphError, match=r"recipe export"):
        read_graph(tmp_path)
    write_llama(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(GraphError, match="no model.safetensors"):
        export(tmp_path / "m")


def test_names_and_patterns_choose_the_scheme(tmp_path: Path) -> None:
    folder = quantize(write_llama(tmp_path / "m"), bits=8)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    first = quantization["config_groups"]["group_0"]
    other = {**first, "targets": ["re:.*mlp.*"], "input_activations": None}
    quantization["config_groups"] = {"a": first, "b": other}
    (folder / "config.json").write_text(json.dumps(config))
    graph = read_graph(export(folder))
    for name, bits in (("mlp.up_proj", 16), ("self_attn.k_proj", 8)):
        matrix = graph.tensors[f"model.layers.0.{name}.weight"]
        assert isinstance(matrix, Matrix)
        assert matrix.activation is not None
        assert matrix.activation.bits == bits


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
