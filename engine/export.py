"""Checkpoint folder -> graph folder, with numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import GraphError
from ..progress import Progress
from .checkpoint import Checkpoint
from .compressed import Weight, Weights
from .graph import Activation, Attention, Embedding, Head, Linear, Norm, Op
from .graph_writer import GraphWriter
from .lowering import Program, lower

TokenStorage: TypeAlias = Literal["keep", "f16", "int8"]
HEAD = "lm_head"


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    head: TokenStorage = "keep",
    embedding: TokenStorage = "keep",
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the graph of a Hugging Face folder to `output` (default: its `graph`); returns that.

    Pruned weights (of `pruning_masks.npz`, else those that are 0) are left out where a bitmask is
    smaller. `head` stores the logits matrix as it is, in float16, or in int8 per row; int8 is
    weight-only, because rounding the last activations as well costs 1 % of perplexity. `embedding`
    does the same for the embedding; a tied matrix that both store alike is stored once.
    `provenance` is kept in the graph (JSON values). Raises GraphError when the engine could not
    compute exactly what the checkpoint means.
    """
    source = Checkpoint.open(checkpoint)
    weights = Weights(source)
    program = lower(source.config)
    output = Path(output) if output is not None else source.folder / "graph"
    tokenizer, tokenizer_bytes = source.tokenizer()
    with GraphWriter(output) as writer:
        ops = _Exporter(source, weights, program, writer, head, embedding).run(progress)
        _check_complete(source, program)
        writer.finish(
            program.model,
            ops,
            tokenizer,
            tokenizer_bytes,
            generation=source.sampling(),
            # No times or paths of our own: the same checkpoint gives the same bytes.
            provenance={
                "paring": version("paring"),
                "head": head,
                "embedding": embedding,
                **(provenance or {}),
            },
        )
    return output


def _check_complete(source: Checkpoint, program: Program) -> None:
    """Every tensor and mask of the checkpoint was used: an unknown one would change the numbers."""
    left = sorted(
        name
        for name in source.files.keys() - source.taken
        if not name.endswith(".rotary_emb.inv_freq")
    )
    if left:
        raise GraphError(
            f"{source.folder}: {len(left)} tensors are not part of a {program.model.architecture} "
            f"as config.json describes it, first {left[0]!r}"
        )
    if unknown := sorted(source.masks.keys() - source.taken):
        raise GraphError(f"{source.folder}: a pruning mask for {unknown[0]!r}, which is no weight")


class _Exporter:
    """Stores what the ops name, each tensor once."""

    def __init__(
        self,
        source: Checkpoint,
        weights: Weights,
        program: Program,
        writer: GraphWriter,
        head: TokenStorage,
        embedding: TokenStorage,
    ) -> None:
        self.source = source
        self.weights = weights
        self.program = program
        self.writer = writer
        self.head = head
        self.embedding = embedding

    def run(self, progress: Progress | None) -> list[Op]:
        """Write all tensors; returns the ops, the head naming the embedding where they are one."""
        for name, values in self.program.constants.items():
            self.writer.vector(name, values)
        ops: list[Op] = []
        for done, op in enumerate(self.program.ops):
            if isinstance(op, Embedding):
                weight = self.weights.read(op.weight.removesuffix(".weight"), "Embedding")
                self.write(op.weight, _stored_as(weight, self.embedding), dense=True)
            elif isinstance(op, Norm):
                self.vector(op.weight)
                self.vector(op.bias)
            elif isinstance(op, Head):
                op = self.logits(op)
            elif isinstance(op, Attention):
                self.cache_scale(op.k_scale, op.kv_heads)
                self.cache_scale(op.v_scale, op.kv_heads)
            elif isinstance(op, Linear):
                self.matrix(op.weight)
                self.vector(op.bias)
            ops.append(op)
            self.source.forget_pages()
            if progress is not None:
                progress("export", done + 1, len(self.program.ops))
        return ops

    def vector(self, name: str | None) -> None:
        if name is not None:
            self.writer.vector(name, self.source.float32(name))

    def cache_scale(self, name: str | None, kv_heads: int) -> None:
        """A scale per head; one per tensor is repeated."""
        if name is None:
            return
        values = self.source.float32(name).reshape(-1)
        if values.size not in (1, kv_heads) or not (values > 0).all():
            raise GraphError(
                f"{self.source.folder}: {name} must be 1 or {kv_heads} positive scales"
            )
        self.writer.vector(name, np.full(kv_heads, values, np.float32))

    def matrix(self, name: str, kind: str = "Linear", dense: bool = False) -> None:
        self.write(name, self.weights.read(name.removesuffix(".weight"), kind), dense)

    def write(self, name: str, weight: Weight, dense: bool = False) -> None:
        fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
        # No kernel reads float16 under a bitmask, which the format would allow.
        half = weight.values.dtype == np.float16
        self.writer.matrix(name, **fields, dense=dense or half)

    def logits(self, op: Head) -> Head:
        """The head: the embedding itself when tied and stored alike, else a matrix of its own."""
        self.vector(op.bias)
        tied = self.program.tied
        if tied is not None and self.weights.exists(HEAD):
            tied = self._still_tied(tied)
        if tied is not None and self.head == self.embedding:
            return dataclasses.replace(op, weight=tied)
        owner, kind = (tied.removesuffix(".weight"), "Embedding") if tied else (HEAD, "Linear")
        self.write(op.weight, _stored_as(self.weights.read(owner, kind), self.head))
        return op

    def _still_tied(self, tied: str) -> str | None:
        """A tied checkpoint that also has a head: None if that was quantized alone."""
        if self.weights.is_quantized(HEAD):
            return None
        if not np.array_equal(
            self.source.float32(f"{HEAD}.weight"), self.source.float32(tied), equal_nan=True
        ):
            raise GraphError(
                f"{self.source.folder}: config.json ties head and embedding, but {HEAD}.weight is "
                "another matrix; set tie_word_embeddings to false if that is meant"
            )
        return tied


def _stored_as(weight: Weight, storage: TokenStorage) -> Weight:
    """The embedding or logits matrix in the storage asked for; one that is integer already stays as it is."""
    if weight.scales is not None or storage == "keep":
        return weight
    values = weight.values
    if storage == "f16":
        return dataclasses.replace(weight, values=values.astype(np.float16))
    return quantize_rows(weight)


def quantize_rows(weight: Weight) -> Weight:
    """Symmetric int8 per output row, round half to even; weight-only.

    scale = max|row| / 127.5 and values clamped to -128..127, as compressed-tensors has it.
    """
    values = weight.values.astype(np.float32)
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127.5)
    safe = np.where(scales > 0, scales, np.float32(1))
    return Weight(
        values=np.clip(np.rint(values / safe), -128, 127).astype(np.int8),
        mask=weight.mask,
        scales=safe,
        activation=Activation(bits=16),
    )
