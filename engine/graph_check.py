"""Whether a graph makes sense: ops against tensors, tensors against their stored parts.

Everything that `read_graph` promises beyond JSON types and checksums is checked here, so that
whoever runs a graph may index with what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from . import storage
from .graph import (
    TENSOR_FILE,
    UNKNOWN,
    Activate,
    Attention,
    Embedding,
    Gate,
    Graph,
    Head,
    Linear,
    Matrix,
    Norm,
    Op,
    Rope,
    Tensor,
)
from .strict_json import REMAKE

# No real model comes near these; they bound what a hostile file can make a reader allocate.
LARGEST_DIMENSION = 2**31 - 1
LARGEST_COUNT = 2**24


def fault(where: str, what: str) -> NoReturn:
    raise GraphError(f"{where}: {what}; {REMAKE}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Shape, group, counts, activation and the set of parts of one tensor agree with each other."""
    where = f"tensors.{name}"
    if not all(1 <= size <= LARGEST_DIMENSION for size in tensor.shape):
        fault(where, f"shape {list(tensor.shape)} is out of range")
    if isinstance(tensor, Matrix):
        _check_matrix(where, tensor)
    if tensor.parts.keys() != tensor.layout().keys():
        fault(where, f"parts {sorted(tensor.parts)} instead of {sorted(tensor.layout())}")


def _check_matrix(where: str, matrix: Matrix) -> None:
    n, k = matrix.shape
    if not 0 <= matrix.nonzeros <= n * k:
        fault(where, f"{matrix.nonzeros} non-zeros of {n * k} weights")
    if not 0 <= matrix.group <= k or (matrix.group and not matrix.quantized):
        fault(where, f"group {matrix.group} does not fit {matrix.dtype} with {k} inputs")
    if matrix.quantized != (matrix.activation is not None):
        fault(where, f"{matrix.dtype} with activation {matrix.activation}")
    if matrix.activation and (matrix.activation.bits == 8) != (
        matrix.activation.dynamic is not None
    ):
        fault(where, "int8 activations are dynamic or static, and 16 bits are neither")


def check_parts(name: str, tensor: Tensor, parts: Mapping[str, NDArray[Any]]) -> None:
    """The data of one tensor: mask population, padding, lengths that depend on it, finite scales.

    Arrays have the dtypes and shapes of `tensor.layout()` already.
    """
    where = f"{TENSOR_FILE}: {name}"
    # The weights themselves were finite when they were written, and are many.
    for part in ("scales", "input_scale") if isinstance(tensor, Matrix) else ("values",):
        if part in parts and not np.isfinite(parts[part]).all():
            fault(where, f"{part} are not all finite")
    if not isinstance(tensor, Matrix):
        return
    if "input_scale" in parts:
        if not parts["input_scale"][0] > 0:
            fault(where, "the input scale is not positive")
        if not -128 <= parts["input_zero_point"][0] <= 127:
            fault(where, "the input zero point is not an int8")
    k = tensor.shape[1]
    if tensor.storage == "dense":
        if tensor.dtype == "i4" and k % 2 and (parts["values"][:, -1] >> 4).any():
            fault(where, "the padding after odd rows is not 0")
        return
    if not storage.padding_is_zero(parts["mask"], k):
        fault(where, "bits of the mask past the last column are set")
    counts = storage.row_counts(parts["mask"])
    if counts.sum() != tensor.nonzeros:
        fault(where, f"the mask keeps {counts.sum()} weights, graph.json says {tensor.nonzeros}")
    if tensor.dtype == "i4" and len(parts["values"]) != storage.kept_int4_bytes(counts):
        fault(where, f"{len(parts['values'])} bytes of values do not fit the mask")


def fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a stored shape is the one the layout gives."""
    return len(shape) == len(expected) and all(
        size == wanted or wanted == UNKNOWN for size, wanted in zip(shape, expected, strict=True)
    )


def check_graph(graph: Graph) -> None:
    """Raises GraphError unless sizes are sane and the ops form a program over the tensors."""
    model = graph.model
    for field in ("vocab_size", "hidden_size", "context"):
        if not 1 <= getattr(model, field) <= LARGEST_COUNT:
            fault(f"graph.json: model.{field}", f"{getattr(model, field)} is out of range")
    if not 0 <= model.caches <= len(graph.ops):
        fault("graph.json: model.caches", f"{model.caches} caches for {len(graph.ops)} ops")
    if graph.tokenizer is not None:
        ids = [
            *graph.tokenizer.eos,
            *([] if graph.tokenizer.bos is None else [graph.tokenizer.bos]),
        ]
        if not all(0 <= token < model.vocab_size for token in ids):
            fault("graph.json: tokenizer", f"special ids {ids} are not in the vocabulary")
    for name, tensor in graph.tensors.items():
        check_tensor(name, tensor)
    _Program(graph).check()


class _Program:
    """Walks the ops with the width of every value written so far."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.widths: dict[str, int] = {}
        self.caches: set[int] = set()
        self.used: set[str] = set()
        self.where = ""

    def check(self) -> None:
        ops = self.graph.ops
        for index, op in enumerate(ops):
            self.where = f"graph.json: ops[{index}] ({op.op})"
            if op.out in self.widths:
                fault(self.where, f"{op.out!r} is written twice")
            if isinstance(op, Head) != (index == len(ops) - 1):
                fault(self.where, "the head must be the last op, and only that")
            self.widths[op.out] = self.width(op)
        if not ops:
            fault("graph.json: ops", "there are none")
        if len(self.caches) != self.graph.model.caches:
            fault("graph.json: model.caches", f"{len(self.caches)} caches are used")
        if unused := sorted(self.graph.tensors.keys() - self.used):
            fault("graph.json: tensors", f"no op uses {unused[0]!r}")

    def width(self, op: Op) -> int:
        """Width of the op's output, after checking its inputs and weights."""
        if isinstance(op, Embedding):
            return self.embedding(op)
        if isinstance(op, Linear | Head):
            return self.linear(op)
        if isinstance(op, Norm):
            width = self.read(op.input)
            self.vector(op.weight, width)
            self.vector(op.bias, width)
            if not 0 <= op.eps <= 1:
                fault(self.where, f"eps {op.eps} is out of range")
            return width
        if isinstance(op, Rope):
            return self.rope(op)
        if isinstance(op, Attention):
            return self.attention(op)
        if isinstance(op, Activate):
            return self.read(op.input)
        a, b = (op.gate, op.up) if isinstance(op, Gate) else (op.a, op.b)
        return self.read(a, self.read(b))

    def read(self, name: str, width: int | None = None) -> int:
        if name not in self.widths:
            fault(self.where, f"{name!r} is read before it is written")
        if width is not None and self.widths[name] != width:
            fault(self.where, f"{name!r} is {self.widths[name]} wide, not {width}")
        return self.widths[name]

    def tensor(self, name: str) -> Tensor:
        if name not in self.graph.tensors:
            fault(self.where, f"there is no tensor {name!r}")
        self.used.add(name)
        return self.graph.tensors[name]

    def vector(self, name: str | None, size: int) -> None:
        if name is None:
            return
        tensor = self.tensor(name)
        if isinstance(tensor, Matrix) or tensor.shape != (size,):
            fault(self.where, f"{name!r} is not a vector of {size}")

    def matrix(self, name: str) -> Matrix:
        tensor = self.tensor(name)
        if not isinstance(tensor, Matrix):
            fault(self.where, f"{name!r} is not a matrix")
        return tensor

    def embedding(self, op: Embedding) -> int:
        matrix, model = self.matrix(op.weight), self.graph.model
        if matrix.dtype == "i4" or matrix.group or matrix.storage != "dense":
            fault(self.where, f"{op.weight!r} must be dense f32, f16 or i8 with a scale per row")
        if matrix.shape != (model.vocab_size, model.hidden_size):
            fault(self.where, f"{op.weight!r} is not [vocab_size, hidden_size]")
        return matrix.shape[1]

    def linear(self, op: Linear | Head) -> int:
        n, k = self.matrix(op.weight).shape
        self.read(op.input, k)
        self.vector(op.bias, n)
        if isinstance(op, Head) and n != self.graph.model.vocab_size:
            fault(self.where, f"{n} logits for a vocabulary of {self.graph.model.vocab_size}")
        return n

    def heads(self, *sizes: int) -> None:
        if not all(1 <= size <= LARGEST_COUNT for size in sizes):
            fault(self.where, f"head sizes {list(sizes)} are out of range")

    def rope(self, op: Rope) -> int:
        self.heads(op.heads, op.head_dim)
        width = self.read(op.input, op.heads * op.head_dim)
        frequencies = self.tensor(op.inv_freq)
        if isinstance(frequencies, Matrix) or 2 * frequencies.shape[0] > op.head_dim:
            fault(self.where, f"{op.inv_freq!r} is no vector of at most {op.head_dim // 2}")
        return width

    def attention(self, op: Attention) -> int:
        self.heads(op.heads, op.kv_heads, op.head_dim)
        if op.heads % op.kv_heads:
            fault(self.where, f"{op.heads} heads do not share {op.kv_heads} key/value heads")
        self.read(op.k, op.kv_heads * op.head_dim)
        self.read(op.v, op.kv_heads * op.head_dim)
        if not 0 <= op.cache < self.graph.model.caches or op.cache in self.caches:
            fault(
                self.where, f"cache {op.cache} is taken, or is not one of {self.graph.model.caches}"
            )
        self.caches.add(op.cache)
        if (op.k_scale is None) != (op.v_scale is None):
            fault(self.where, "k_scale and v_scale go together")
        self.vector(op.k_scale, op.kv_heads)
        self.vector(op.v_scale, op.kv_heads)
        return self.read(op.q, op.heads * op.head_dim)
