"""The graph format as typed dataclasses: what `graph.json` says (docs/architecture.md, graph).

`graph_file.read_graph` reads and verifies a folder into a `Graph`; `graph_writer.GraphWriter`
writes one. Tensor data are entries of `graph.safetensors` named `<tensor>/<part>`; `layout` gives the
dtype and shape that each part must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

FORMAT = "paring.graph"
VERSION = 1
GRAPH_FILE = "graph.json"
TENSOR_FILE = "graph.safetensors"

# Shapes of parts whose length only the mask tells (int4 values under a bitmask).
UNKNOWN = -1

Layout: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
Kind: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One safetensors entry of a tensor: the SHA-256 of its bytes, in hexadecimal."""

    sha256: str


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Input of a quantized matrix: int8 (dynamic per token, or static), or 16 = weight-only."""

    bits: Literal[8, 16]
    dynamic: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A float32 vector: norm weights, biases, rope frequencies."""

    kind: Literal["vector"] = "vector"
    shape: tuple[int]
    parts: dict[str, Part]

    def layout(self) -> Layout:
        """Parts with their safetensors dtype and shape."""
        return {"values": ("F32", self.shape)}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight [n outputs, k inputs]; `nonzeros` counts the weights that pruning kept.

    `group` is the number of consecutive inputs that share a scale, 0 = one scale per output row.
    """

    kind: Literal["matrix"] = "matrix"
    shape: tuple[int, int]
    dtype: Literal["f32", "f16", "i8", "i4"]
    storage: Literal["dense", "bitmask"]
    group: int = 0
    nonzeros: int
    activation: Activation | None
    parts: dict[str, Part]

    @property
    def quantized(self) -> bool:
        return self.dtype in ("i8", "i4")

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.shape[1] // self.group) if self.group else 1

    def layout(self) -> Layout:
        """Parts with their safetensors dtype and shape.

        int4 values under a bitmask have length UNKNOWN: each row starts on a byte.
        """
        n, k = self.shape
        dtype = {"f32": "F32", "f16": "F16", "i8": "I8", "i4": "U8"}[self.dtype]
        shape: tuple[int, ...] = (n, -(-k // 2)) if self.dtype == "i4" else (n, k)
        if self.storage == "bitmask":
            shape = (UNKNOWN,) if self.dtype == "i4" else (self.nonzeros,)
        layout: Layout = {"values": (dtype, shape)}
        if self.storage == "bitmask":
            layout["mask"] = ("U8", (n, -(-k // 8)))
        if self.quantized:
            layout["scales"] = ("F32", (n, self.groups))
        if self.activation is not None and self.activation.dynamic is False:
            layout["input_scale"] = ("F32", (1,))
            layout["input_zero_point"] = ("I32", (1,))
        return layout


Tensor: TypeAlias = Vector | Matrix


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """out[t] = weight[token t]."""

    op: Literal["embedding"] = "embedding"
    weight: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMS norm or layer norm over the width, times `weight`, plus `bias`."""

    op: Literal["norm"] = "norm"
    kind: Literal["rms", "layer"]
    weight: str
    bias: str | None = None
    eps: float
    input: str = field(metadata={"key": "in"})
    out: str


@dataclass(frozen=True, kw_only=True)
class Linear:
    """out = input W^T + bias."""

    op: Literal["linear"] = "linear"
    weight: str
    bias: str | None = None
    input: str = field(metadata={"key": "in"})
    out: str


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on the first 2 * len(inv_freq) dimensions of each head.

    cos and sin are multiplied by `scale`. `half` pairs dimension i with i + rotary/2, as Hugging
    Face models do; `interleaved` pairs 2i with 2i + 1.
    """

    op: Literal["rope"] = "rope"
    input: str = field(metadata={"key": "in"})
    out: str
    heads: int
    head_dim: int
    inv_freq: str
    style: Literal["half", "interleaved"]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention, softmax(scale q k^T) v, over the key/value cache number `cache`.

    k_scale, v_scale: vectors [kv_heads] where the checkpoint was calibrated for an int8 cache: what is kept is
    clamp(round(x / scale), -128, 127) of each head.
    """

    op: Literal["attention"] = "attention"
    q: str
    k: str
    v: str
    out: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cache: int
    k_scale: str | None = None
    v_scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """out = kind(gate) * up."""

    op: Literal["gate"] = "gate"
    kind: Kind
    gate: str
    up: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Activate:
    """out = kind(input); the JSON calls this op `activation`."""

    op: Literal["activation"] = "activation"
    kind: Kind
    input: str = field(metadata={"key": "in"})
    out: str


@dataclass(frozen=True, kw_only=True)
class Add:
    """out = a + b."""

    op: Literal["add"] = "add"
    a: str
    b: str
    out: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """Logits, input W^T + bias; always the last op, computed only for the tokens asked for."""

    op: Literal["head"] = "head"
    weight: str
    bias: str | None = None
    input: str = field(metadata={"key": "in"})
    out: str


Op: TypeAlias = Embedding | Norm | Linear | Rope | Attention | Gate | Activate | Add | Head


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes, the longest context in tokens, and the number of key/value caches."""

    architecture: str
    vocab_size: int
    hidden_size: int
    context: int
    caches: int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A `tokenizers` file beside graph.json, the special ids, and the Jinja chat template."""

    file: str
    sha256: str
    bos: int | None
    eos: tuple[int, ...]
    chat_template: str | None


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size of a file beside graph.json."""

    bytes: int


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A whole graph; `arrays` maps `<tensor>/<part>` to its data (read-only views of the file).

    `arrays` and `folder` are not part of graph.json; a graph made by `read_graph` has both.
    """

    model: Model
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    provenance: dict[str, Any]
    files: dict[str, FileInfo]
    tensors: dict[str, Tensor]
    ops: tuple[Op, ...]
    arrays: Mapping[str, np.ndarray] = field(
        default_factory=dict, metadata={"key": None}, repr=False, compare=False
    )
    folder: Path | None = field(default=None, metadata={"key": None}, compare=False)

    def parts(self, tensor: str) -> dict[str, np.ndarray]:
        """The arrays of one tensor by part name, with the shapes that `layout` gives."""
        return {part: self.arrays[f"{tensor}/{part}"] for part in self.tensors[tensor].parts}
