"""Graphs made op by op in memory, for tests that need one op or a broken rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from paring.engine.graph import (
    Activation,
    Embedding,
    Graph,
    Head,
    Matrix,
    Model,
    Op,
    Part,
    Tensor,
    Vector,
)

Array = np.ndarray
UNHASHED = Part(sha256="0" * 64)  # nothing here is read from a file


class Builder:
    """Collects tensors and ops. The first op looks tokens up, the head shows one value as logits."""

    def __init__(self, width: int, vocabulary: int = 40, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.width, self.vocabulary = width, vocabulary
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, Array] = {}
        self.ops: list[Op] = []
        self.caches = 0
        self.matrix("embedding", self.normal(vocabulary, width))
        self.ops.append(Embedding(weight="embedding", out="x"))

    def normal(self, *shape: int) -> Array:
        return self.random.standard_normal(shape).astype(np.float32)

    def vector(self, name: str, values: Array) -> str:
        values = values.astype(np.float32)
        self.tensors[name] = Vector(shape=values.shape, parts={"values": UNHASHED})
        self.arrays[f"{name}/values"] = values
        return name

    def matrix(
        self,
        name: str,
        values: Array,
        scales: Array | None = None,
        activation: Activation | None = None,
        group: int = 0,
        keep: Array | None = None,
        static: tuple[float, int] | None = None,
    ) -> str:
        """Float32, float16 or int8 values [n, k]; `keep` [n, k] stores a bitmask."""
        kept = values.size if keep is None else int(keep.sum())
        parts = {"values": values if keep is None else values[keep]}
        if keep is not None:
            parts["mask"] = np.packbits(keep, axis=1, bitorder="little")
        if scales is not None:
            parts["scales"] = scales.astype(np.float32)
        if static is not None:
            parts["input_scale"] = np.array([static[0]], np.float32)
            parts["input_zero_point"] = np.array([static[1]], np.int32)
        self.tensors[name] = Matrix(
            shape=values.shape,
            dtype={"float32": "f32", "float16": "f16", "int8": "i8"}[values.dtype.name],
            storage="dense" if keep is None else "bitmask",
            group=group,
            nonzeros=kept,
            activation=activation,
            parts=dict.fromkeys(parts, UNHASHED),
        )
        self.arrays |= {f"{name}/{part}": array for part, array in parts.items()}
        return name

    def integers(self, name: str, n: int, k: int, sparsity: float = 0.0, **how: Any) -> str:
        """A random int8 matrix [n, k], dynamic activations by default."""
        values = self.random.integers(-128, 128, (n, k)).astype(np.int8)
        keep = self.random.random((n, k)) >= sparsity if sparsity else None
        how.setdefault("activation", Activation(bits=8, dynamic=True))
        group = how.get("group", 0)
        scales = 0.002 + 0.01 * self.random.random((n, -(-k // group) if group else 1))
        if keep is not None:
            values[~keep] = 0
        return self.matrix(name, values, scales, keep=keep, **how)

    def add(self, *ops: Op) -> None:
        self.ops.extend(ops)

    def graph(self, out: str, context: int = 64, head: str | None = None) -> Graph:
        """The graph whose logits are the value `out`, or its product with the matrix `head`."""
        return Graph(
            model=Model(
                architecture="Handmade",
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                context=context,
                caches=self.caches,
            ),
            tokenizer=None,
            generation={},
            provenance={},
            files={},
            tensors=dict(self.tensors),
            ops=(*self.ops, Head(weight=head or "identity", input=out, out="logits")),
            arrays=dict(self.arrays),
        )

    def show(self, out: str, width: int, context: int = 64) -> Graph:
        """A graph whose logits are exactly `out`, then zeros; needs vocabulary >= width."""
        self.matrix("identity", np.eye(self.vocabulary, width, dtype=np.float32))
        return self.graph(out, context)
