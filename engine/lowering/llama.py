"""Llama and Mistral: rotary grouped-query attention, gated MLP, RMS norm."""

from __future__ import annotations

from typing import Literal

from ..graph import Add, Attention, Embedding, Gate, Head, Kind, Linear, Model, Norm, Op, Rope
from .cache import has_int8_cache
from .config import Config
from .program import Program
from .rope import inverse_frequencies

KINDS: dict[str, Kind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
INV_FREQ = "rope.inv_freq"
EMBEDDING = "model.embed_tokens.weight"


def lower_mistral(config: Config) -> Program:
    """As Llama; a sliding window (4096 unless the config says otherwise) must not be in reach."""
    window = config.values.get("sliding_window", 4096)
    if window is not None and config.integer("sliding_window", 4096) < config.integer(
        "max_position_embeddings"
    ):
        config.refuse(
            "sliding_window", window, "null, or at least max_position_embeddings (lower that)"
        )
    return _lower(config, "MistralForCausalLM", attention_bias=False, mlp_bias=False)


def lower_llama(config: Config) -> Program:
    if config.value("sliding_window", None) is not None:
        config.refuse("sliding_window", config.value("sliding_window"), "null for a Llama model")
    return _lower(
        config,
        "LlamaForCausalLM",
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )


def _lower(config: Config, architecture: str, attention_bias: bool, mlp_bias: bool) -> Program:
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    block = _Block(config, attention_bias, mlp_bias)
    ops: list[Op] = [Embedding(weight=EMBEDDING, out="h0")]
    for layer in range(layers):
        ops += block.ops(layer)
    last = f"h{layers}"
    ops.append(block.norm("model.norm", last, "final"))
    ops.append(Head(weight="lm_head.weight", input="final", out="logits"))
    return Program(
        model=Model(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden,
            context=config.integer("max_position_embeddings"),
            caches=layers,
        ),
        ops=tuple(ops),
        constants={INV_FREQ: inverse_frequencies(config, block.head_dim)},
        tied=EMBEDDING if config.flag("tie_word_embeddings", False) else None,
    )


class _Block:
    """The ops of one decoder block, `h<i>` -> `h<i + 1>`."""

    def __init__(self, config: Config, attention_bias: bool, mlp_bias: bool) -> None:
        self.heads = config.integer("num_attention_heads")
        self.kv_heads = config.integer("num_key_value_heads", self.heads)
        self.head_dim = config.integer("head_dim", config.integer("hidden_size") // self.heads)
        self.eps = config.number("rms_norm_eps")
        kind = config.value("hidden_act", "silu")
        if kind not in KINDS:
            config.refuse("hidden_act", kind, "one of " + ", ".join(KINDS))
        self.kind = KINDS[kind]
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.int8_cache = has_int8_cache(config)

    def norm(self, name: str, source: str, out: str) -> Norm:
        return Norm(kind="rms", weight=f"{name}.weight", eps=self.eps, input=source, out=out)

    def linear(self, name: str, source: str, out: str, bias: bool) -> Linear:
        bias_name = f"{name}.bias" if bias else None
        return Linear(weight=f"{name}.weight", bias=bias_name, input=source, out=out)

    def rope(self, source: str, heads: int) -> Rope:
        style: Literal["half"] = "half"
        return Rope(
            input=source,
            out=f"{source}.rope",
            heads=heads,
            head_dim=self.head_dim,
            inv_freq=INV_FREQ,
            style=style,
            scale=1.0,
        )

    def ops(self, i: int) -> list[Op]:
        name, before, middle, after = f"model.layers.{i}", f"h{i}", f"{i}.middle", f"h{i + 1}"
        attention, mlp, bias = f"{name}.self_attn", f"{name}.mlp", self.attention_bias
        return [
            self.norm(f"{name}.input_layernorm", before, f"{i}.x"),
            self.linear(f"{attention}.q_proj", f"{i}.x", f"{i}.q", bias),
            self.linear(f"{attention}.k_proj", f"{i}.x", f"{i}.k", bias),
            self.linear(f"{attention}.v_proj", f"{i}.x", f"{i}.v", bias),
            self.rope(f"{i}.q", self.heads),
            self.rope(f"{i}.k", self.kv_heads),
            Attention(
                q=f"{i}.q.rope",
                k=f"{i}.k.rope",
                v=f"{i}.v",
                out=f"{i}.attention",
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                cache=i,
                k_scale=f"{attention}.k_scale" if self.int8_cache else None,
                v_scale=f"{attention}.v_scale" if self.int8_cache else None,
            ),
            self.linear(f"{attention}.o_proj", f"{i}.attention", f"{i}.o", bias),
            Add(a=before, b=f"{i}.o", out=middle),
            self.norm(f"{name}.post_attention_layernorm", middle, f"{i}.y"),
            self.linear(f"{mlp}.gate_proj", f"{i}.y", f"{i}.gate", self.mlp_bias),
            self.linear(f"{mlp}.up_proj", f"{i}.y", f"{i}.up", self.mlp_bias),
            Gate(kind=self.kind, gate=f"{i}.gate", up=f"{i}.up", out=f"{i}.gated"),
            self.linear(f"{mlp}.down_proj", f"{i}.gated", f"{i}.down", self.mlp_bias),
            Add(a=middle, b=f"{i}.down", out=after),
        ]
