from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paring.errors import LawError, ModelError
from paring.modifiers import Session
from paring.modifiers.blocks import Block, Stream, find_blocks
from paring.modifiers.quantization.quantization import Quantization
from paring.modifiers.smoothing.logarithmic_equalization import (
    LogarithmicEqualization,
    logarithmic_scale,
)
from paring.modifiers.smoothing.pairs import find_pairs
from paring.modifiers.smoothing.smoothquant import SmoothQuant

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def randomize_norms(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.rand(parameter.shape)
    return model.eval()


def gemma() -> nn.Module:
    config = Gemma2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return Gemma2ForCausalLM(config)


def cohere() -> nn.Module:
    """Attention and MLP side by side, behind one norm: nothing of the one reaches the other."""
    config = CohereConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)
    return CohereForCausalLM(config)


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64))


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32))


def qwen() -> nn.Module:
    config = Qwen3Config(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return Qwen3ForCausalLM(config)


def first_block(model: nn.Module, calibration: torch.Tensor) -> Block:
    return Stream(model, calibration).block(0)


def short(pairs) -> dict[str, list[str]]:
    return {
        pair.name.rpartition(".")[2]: [name.rpartition(".")[2] for name in pair.consumers]
        for pair in pairs
    }


LINEAR_PAIRS = {"up_proj": ["down_proj"], "v_proj": ["o_proj"]}
LLAMA_PAIRS = {
    "input_layernorm": ["q_proj", "k_proj", "v_proj"],
    "post_attention_layernorm": ["gate_proj", "up_proj"],
    **LINEAR_PAIRS,
}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (None, LLAMA_PAIRS),
        (qwen, LLAMA_PAIRS),
        (
            gemma,
            {
                "input_layernorm": ["q_proj", "k_proj", "v_proj"],
                "pre_feedforward_layernorm": ["gate_proj", "up_proj"],
                **LINEAR_PAIRS,
            },
        ),
        (
            cohere,
            {
                "input_layernorm": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
                **LINEAR_PAIRS,
            },
        ),
        (
            neox,
            {"input_layernorm": ["query_key_value"], "post_attention_layernorm": ["dense_h_to_4h"]},
        ),
        (
            opt,
            {
                "self_attn_layer_norm": ["q_proj", "k_proj", "v_proj"],
                "final_layer_norm": ["fc1"],
                "v_proj": ["out_proj"],
                "fc1": ["fc2"],  # through a ReLU
            },
        ),
    ],
)
def test_pairs_are_found_in_any_architecture(pico, calibration, make, expected):
    torch.manual_seed(0)
    model = randomize_norms(pico() if make is None else make())
    pairs, refused = find_pairs(first_block(model, calibration))
    assert {k: sorted(v) for k, v in short(pairs).items()} == {
        k: sorted(v) for k, v in expected.items()
    }
    assert refused == []
    norms = [pair for pair in pairs if pair.kind == "norm"]
    assert all(pair.offset == (1.0 if make is gemma else 0.0) for pair in norms)


@pytest.mark.parametrize("make", [None, qwen, gemma, neox, opt])
@pytest.mark.parametrize(
    "modifier", [SmoothQuant(smoothing_strength=0.7), LogarithmicEqualization()]
)
def test_the_function_is_preserved(pico, calibration, make, modifier):
    torch.manual_seed(0)
    model = randomize_norms(pico() if make is None else make())
    with torch.no_grad():
        before = model(calibration).logits
        saved = {n: p.clone() for n, p in model.named_parameters()}
        Session(model, [modifier.model_copy()]).run_oneshot(calibration)
        after = model(calibration).logits
    assert torch.allclose(before, after, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, saved[n])}
    blocks = [name for name, _ in find_blocks(model)]
    for block in blocks:  # two norms and the Linears they feed, biases of Linears not
        assert sum(name.startswith(block) and saved[name].ndim == 2 for name in changed) >= 2
        assert sum(name.startswith(block) and saved[name].ndim == 1 for name in changed) >= 2


def test_a_norm_that_something_else_reads_is_refused(calibration):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.linear = nn.Linear(32, 32)

        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            normed = self.norm(hidden_states)
            return hidden_states + self.linear(normed) + 0.1 * normed  # a second reader, no Linear

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(128, 32)
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden = self.embed(ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    block = first_block(Model(), calibration)
    pairs, refused = find_pairs(block)
    assert pairs == []
    assert refused == ["layers.0.norm"]


def test_smoothquant_is_the_formula(pico, calibration):
    model = pico()
    block = first_block(model, calibration)
    largest = {}
    block.run({f"{block.name}.mlp.gate_proj": lambda x: largest.setdefault("x", []).append(x)})
    a = torch.cat(largest["x"]).reshape(-1, 32).abs().amax(dim=0)
    mlp = block.module.mlp
    w = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).abs().amax(dim=0)
    norm, gate = block.module.post_attention_layernorm.weight.clone(), mlp.gate_proj.weight.clone()
    Session(
        model, [SmoothQuant(smoothing_strength=0.8, targets=["gate_proj", "up_proj"])]
    ).run_oneshot(calibration)
    s = a**0.8 / w**0.2
    assert torch.allclose(block.module.post_attention_layernorm.weight, norm / s, rtol=1e-4)
    assert torch.allclose(mlp.gate_proj.weight, gate * s, rtol=1e-4)
    assert torch.equal(block.module.input_layernorm.weight, torch.ones(32))  # not a target


def test_logarithmic_equalization_is_the_formula():
    r = torch.tensor([0.0, 1.0, 6.0, 1000.0])
    s = logarithmic_scale(r)
    expected = [0.01, 1 / math.log2(3), 6 / 3, 1000 / math.log2(1002)]
    assert torch.allclose(s, torch.tensor(expected))


def test_smoothing_after_quantization_is_an_error(pico, calibration):
    with pytest.raises(ModelError, match="put smoothing before Quantization"):
        Session(pico(), [Quantization(), SmoothQuant()]).run_oneshot(calibration)


def test_nothing_to_smooth_is_an_error(pico, calibration):
    with pytest.raises(ModelError, match="found no norm that feeds its targets"):
        Session(pico(), [SmoothQuant(targets=["down_proj"])]).run_oneshot(calibration)


def test_breaking_the_function_is_a_law_error(pico, calibration):
    class _Careless(SmoothQuant):
        def on_block(self, session: Session, block: Block) -> None:
            block.module.input_layernorm.weight.mul_(1.01)

    with pytest.raises(LawError, match=r"_Careless.on_block changed what model.layers.0 computes"):
        Session(pico(), [_Careless()]).run_oneshot(calibration)
