"""Runs a graph with numpy, op by op over the whole sequence: slow, and short enough to be seen to be right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paring.engine.graph import (
    Activate,
    Add,
    Attention,
    Embedding,
    Gate,
    Graph,
    Head,
    Linear,
    Matrix,
    Norm,
    Rope,
)

Array = np.ndarray


def logits(graph: Graph, tokens: list[int], cache: str = "f32") -> Array:
    """float64 [tokens, vocabulary]; keys and values rounded as an int8 `cache` keeps them."""
    values: dict[str, Array] = {}
    for op in graph.ops:
        if isinstance(op, Attention) and cache == "int8":
            kept = {
                name: _kept_as_int8(graph, scale, values[name], op.kv_heads)
                for name, scale in ((op.k, op.k_scale), (op.v, op.v_scale))
            }
            values[op.out] = _attention(op, values[op.q], kept[op.k], kept[op.v])
        else:
            values[op.out] = _run(graph, op, values, tokens)
    return values[graph.ops[-1].out]


def weights(graph: Graph, name: str) -> Array:
    """A stored matrix as float64 [n, k], decoded bit by bit without the package's own code."""
    integers = stored_values(graph, name)
    matrix = graph.tensors[name]
    assert isinstance(matrix, Matrix)
    if not matrix.quantized:
        return integers
    scales = graph.parts(name)["scales"].astype(np.float64)
    n, k = matrix.shape
    return np.array(
        [
            [integers[i, j] * scales[i, j // matrix.group if matrix.group else 0] for j in range(k)]
            for i in range(n)
        ]
    )


def stored_values(graph: Graph, name: str) -> Array:
    """Values before scaling, float64 [n, k]."""
    matrix, parts = graph.tensors[name], graph.parts(name)
    assert isinstance(matrix, Matrix)
    n, k = matrix.shape
    dense = np.zeros((n, k))
    place = 0  # in values: elements, or nibbles for int4
    for i in range(n):
        for j in range(k):
            if "mask" in parts and not parts["mask"][i, j // 8] >> (j % 8) & 1:
                continue
            if matrix.dtype == "i4":
                nibble = int(parts["values"].reshape(-1)[place // 2]) >> (4 * (place % 2)) & 15
                dense[i, j] = nibble - 16 if nibble > 7 else nibble
            else:
                dense[i, j] = parts["values"].reshape(-1)[place]
            place += 1
        if matrix.dtype == "i4":
            place += place % 2
    return dense


def _linear(graph: Graph, op: Linear | Head, x: Array) -> Array:
    matrix, parts = graph.tensors[op.weight], graph.parts(op.weight)
    assert isinstance(matrix, Matrix)
    y = _quantized_input(matrix.activation, parts, x) @ weights(graph, op.weight).T
    return y if op.bias is None else y + graph.arrays[f"{op.bias}/values"]


def _quantized_input(activation: Any, parts: dict[str, Array], x: Array) -> Array:
    """x as the integers it becomes, times their scale."""
    if activation is None or activation.bits == 16:
        return x
    x = x.astype(np.float32)
    if activation.dynamic:
        scale, zero = np.abs(x).max(axis=1, keepdims=True) / np.float32(127.5), 0
    else:
        scale, zero = parts["input_scale"], int(parts["input_zero_point"][0])
    integers = np.clip(np.rint(x / scale) + zero, -128, 127) - zero
    return integers.astype(np.float64) * scale.astype(np.float64)


def _rope(op: Rope, frequencies: Array, x: Array) -> Array:
    x = x.reshape(len(x), op.heads, op.head_dim).copy()
    rotary = 2 * len(frequencies)
    for position in range(len(x)):
        for i, frequency in enumerate(frequencies):
            a, b = (i, i + rotary // 2) if op.style == "half" else (2 * i, 2 * i + 1)
            cos = math.cos(position * frequency) * op.scale
            sin = math.sin(position * frequency) * op.scale
            first, second = x[position, :, a].copy(), x[position, :, b].copy()
            x[position, :, a] = first * cos - second * sin
            x[position, :, b] = second * cos + first * sin
    return x.reshape(len(x), -1)


def _kept_as_int8(graph: Graph, name: str | None, x: Array, kv_heads: int) -> Array:
    """Each head of each token as integers times a float32 scale: the graph's, or its own."""
    heads = x.reshape(len(x), kv_heads, -1).astype(np.float32)
    if name is None:
        scale = np.abs(heads).max(axis=2, keepdims=True) / np.float32(127.5)
    else:
        scale = graph.arrays[f"{name}/values"].reshape(1, -1, 1)
    with np.errstate(over="ignore"):
        steps = np.divide(heads, scale, out=np.zeros_like(heads), where=scale > 0)
    integers = np.clip(np.rint(steps), -128, 127)
    return (integers.astype(np.float64) * scale).reshape(x.shape)


def _attention(op: Attention, q: Array, k: Array, v: Array) -> Array:
    q = q.reshape(len(q), op.heads, op.head_dim)
    k, v = (a.reshape(len(a), op.kv_heads, op.head_dim) for a in (k, v))
    out = np.zeros_like(q)
    for position in range(len(q)):
        for head in range(op.heads):
            shared = head * op.kv_heads // op.heads
            scores = k[: position + 1, shared] @ q[position, head] * op.scale
            chances = np.exp(scores - scores.max())
            out[position, head] = chances / chances.sum() @ v[: position + 1, shared]
    return out.reshape(len(q), -1)


def _activate(kind: str, x: Array) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    if kind == "gelu_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return np.maximum(x, 0)


def _run(graph: Graph, op: Any, values: dict[str, Array], tokens: list[int]) -> Array:
    def vector(name: str) -> Array:
        return graph.arrays[f"{name}/values"].astype(np.float64)

    if isinstance(op, Embedding):
        return weights(graph, op.weight)[tokens].astype(np.float64)
    if isinstance(op, Linear | Head):
        return _linear(graph, op, values[op.input])
    if isinstance(op, Norm):
        x = values[op.input]
        if op.kind == "layer":
            x = x - x.mean(axis=1, keepdims=True)
        y = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + op.eps) * vector(op.weight)
        return y if op.bias is None else y + vector(op.bias)
    if isinstance(op, Rope):
        return _rope(op, vector(op.inv_freq), values[op.input])
    if isinstance(op, Attention):
        return _attention(op, values[op.q], values[op.k], values[op.v])
    if isinstance(op, Gate):
        return _activate(op.kind, values[op.gate]) * values[op.up]
    if isinstance(op, Activate):
        return _activate(op.kind, values[op.input])
    assert isinstance(op, Add)
    return values[op.a] + values[op.b]
