"""Graphs of one model pruned in different patterns, made for their speed and size alone: masks by magnitude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from paring.engine import Engine
from paring.engine.benchmark import benchmark
from paring.engine.export import export
from paring.engine.graph import Activation, Graph, Matrix, Vector
from paring.engine.graph_file import read_graph
from paring.engine.graph_writer import GraphWriter
from paring.engine.storage import unpack
from paring.modifiers import MaskStructure
from paring.modifiers.quantization.layer import half_exact

GROUP = 64  # of int4
HEAD = "lm_head.weight"


def is_pruned(name: str) -> bool:
    return name.endswith("_proj.weight")


def dense_graph(model: str, folder: Path) -> Graph:
    """The model in float with an int8 head; made once."""
    if not (folder / "graph.json").exists():
        export(model, folder, head="int8")
    return read_graph(folder)


def write_pruned(
    dense: Graph, pattern: str, sparsity: float, dtype: str, folder: Path, head: str = "int8"
) -> None:
    """`dense` with its Linears pruned by magnitude and rounded: int8 per row, int4 in groups, int8 inputs.

    head: of `dense`, weight-only; int4 rounds it again.
    """
    structure = MaskStructure.parse(pattern)
    with GraphWriter(folder) as writer:
        for name, tensor in dense.tensors.items():
            parts = dense.parts(name)
            if isinstance(tensor, Vector):
                writer.vector(name, parts["values"])
            elif head == "int4" and name == HEAD:
                q, scales = rounded(unpack(tensor, parts) * parts["scales"], "int4")
                writer.matrix(
                    name,
                    q,
                    scales=scales,
                    bits=4,
                    group=GROUP,
                    activation=tensor.activation,
                    dense=True,
                )
            elif is_pruned(name):
                weight = np.array(unpack(tensor, parts), np.float32)
                kept = structure.mask(torch.from_numpy(weight).square(), sparsity).numpy()
                q, scales = rounded(weight * kept, dtype)
                writer.matrix(
                    name,
                    q,
                    mask=kept,
                    scales=scales,
                    bits=8 if dtype == "int8" else 4,
                    group=0 if dtype == "int8" else GROUP,
                    activation=Activation(bits=8, dynamic=True),
                )
            else:
                assert isinstance(tensor, Matrix)
                writer.matrix(
                    name,
                    unpack(tensor, parts),
                    scales=parts["scales"] if tensor.quantized else None,
                    activation=tensor.activation,
                    dense=tensor.storage == "dense",
                )
        writer.finish(dense.model, dense.ops)


def rounded(weight: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric integers [n, k] and their scales [n, groups], those of int4 exact in float16 as a quantizer's are."""
    n, k = weight.shape
    width, limit = (k, 127.5) if dtype == "int8" else (GROUP, 7.5)
    groups = weight.reshape(n, -1, width)
    scales = np.abs(groups).max(axis=2) / np.float32(limit)
    safe = np.where(scales > 0, scales, np.float32(1))
    safe = half_exact(torch.from_numpy(safe)).numpy()
    q = np.clip(np.rint(groups / safe[:, :, None]), -np.ceil(limit), np.floor(limit))
    return q.astype(np.int8).reshape(n, k), safe


def bytes_per_weight(folder: Path) -> dict[str, float]:
    """Of the pruned Linears, scales included: in the graph's file, and as decoding reads them."""
    with Engine.load(folder) as engine:
        graph = engine.graph
        names = [name for name in graph.tensors if is_pruned(name)]
        size = sum(int(np.prod(graph.tensors[name].shape)) for name in names)
        file = sum(part.nbytes for name in names for part in graph.parts(name).values())
        read = sum(engine.info()["matrices"][name]["bytes"] for name in names)
    return {"file_bytes": file / size, "read_bytes": read / size}


def is_dense(folder: Path) -> bool:
    """Does this machine's row keep every pruned Linear as if nothing had been pruned?"""
    with Engine.load(folder) as engine:
        matrices = engine.info()["matrices"]
    return all(m["layout"].endswith("_dense") for name, m in matrices.items() if is_pruned(name))


def speed(folder: Path, against: Path, threads: int | None, rounds: int) -> dict[str, Any]:
    """Decoding, tokens per second, and the ratio to another graph's in the same run."""
    found = benchmark(folder, against, prompt=16, tokens=64, threads=threads, rounds=rounds)
    return {
        "decode": found.speed.decode_median,
        "of_dense_int8": found.decode_ratio,
        "threads": found.threads,
        "machine": found.machine,
        "kernels": found.speed.kernels,
    }
