"""A `Graph` handed to the compiled engine: weights packed for this machine, ops checked."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import GraphError
from ..progress import Progress
from . import _core
from .graph import Attention, Embedding, Graph, Head, Linear, Matrix, Op, Vector
from .tensor_file import forget_pages

PACKERS = 16  # most threads that pack at once

KvType: TypeAlias = Literal["auto", "f32", "f16", "int8"]


def pack(
    graph: Graph,
    *,
    threads: int,
    kernels: str,
    cache: KvType,
    pin: bool = False,
    progress: Progress | None = None,
) -> _core.Model:
    """The model that runs `graph` with `threads` threads, each on a CPU of its own with `pin`.

    cache: how keys and values are kept; "auto" is int8 if the graph has calibrated scales for it,
    and else f16 if any matrix is quantized: rounding to int8 hides that to f16, and the cache is
    read as often as the weights are.
    Raises GraphError when the graph can't run on this machine, or breaks a rule of the format.
    """
    loader = _core.Loader(kernels)
    jobs = [(name, use) for use in ("table", "matrix") for name in sorted(_weights(graph, use))]
    for name, tensor in graph.tensors.items():
        if isinstance(tensor, Vector):
            loader.vector(name, graph.parts(name)["values"])
    with ThreadPoolExecutor(min(threads, PACKERS)) as pool:
        running = [pool.submit(_pack_one, loader, graph, name, use) for name, use in jobs]
        try:
            for done, job in enumerate(as_completed(running)):
                job.result()
                if progress is not None:
                    progress("load", done + 1, len(running))
        finally:
            pool.shutdown(cancel_futures=True)
    forget_pages(graph.arrays.values())  # weights are packed now; embedding rows come back
    model = graph.model
    return loader.finish(
        ops=[_fields(op) for op in graph.ops],
        vocabulary=model.vocab_size,
        hidden=model.hidden_size,
        context=model.context,
        caches=model.caches,
        kv=_kv_type(graph) if cache == "auto" else cache,
        threads=threads,
        pin=pin,
    )


def has_calibrated_cache(graph: Graph) -> bool:
    """Whether the checkpoint was calibrated for an int8 cache: attentions have scales for it."""
    return any(isinstance(op, Attention) and op.k_scale is not None for op in graph.ops)


def _kv_type(graph: Graph) -> str:
    if has_calibrated_cache(graph):
        return "int8"
    quantized = any(isinstance(t, Matrix) and t.quantized for t in graph.tensors.values())
    return "f16" if quantized else "f32"


def _weights(graph: Graph, use: str) -> set[str]:
    """Names of the matrices that ops look tokens up in ("table") or multiply by ("matrix")."""
    kinds = (Embedding,) if use == "table" else (Linear, Head)
    names = {op.weight for op in graph.ops if isinstance(op, kinds)}
    for name in names:
        if not isinstance(graph.tensors.get(name), Matrix):
            raise GraphError(f"ops: there is no matrix {name!r}; export the graph again")
    return names


def _pack_one(loader: _core.Loader, graph: Graph, name: str, use: str) -> None:
    tensor, parts = graph.tensors[name], graph.parts(name)
    assert isinstance(tensor, Matrix)
    matrix = _core.Matrix(
        rows=tensor.shape[0],
        columns=tensor.shape[1],
        dtype=tensor.dtype,
        group=tensor.group,
        nonzeros=tensor.nonzeros,
        values=np.asarray(parts["values"]),
        mask=np.asarray(parts["mask"]) if tensor.storage == "bitmask" else None,
        scales=np.asarray(parts["scales"]) if tensor.quantized else None,
        mode=_mode(tensor),
        input_scale=float(_single(name, parts, "input_scale")),
        input_zero_point=int(_single(name, parts, "input_zero_point")),
    )
    (loader.table if use == "table" else loader.matrix)(name, matrix)


def _single(name: str, parts: dict[str, np.ndarray], part: str) -> Any:
    """The one value of a part; 0 where activations are not static, so have no such part."""
    if part not in parts:
        return 0
    if parts[part].size != 1:
        raise GraphError(f"tensor {name!r}: {part} has {parts[part].size} values, expected 1")
    return parts[part].item()


def _mode(matrix: Matrix) -> str:
    """How the kernels take the input of this matrix (cpp/kernels/kernels.h, InputMode)."""
    if matrix.activation is None:
        return "f32"
    if matrix.activation.bits == 16:
        return "int16"
    return "int8_dynamic" if matrix.activation.dynamic else "int8_static"


def _fields(op: Op) -> dict[str, Any]:
    """The op as graph.json writes it."""
    return {f.metadata.get("key", f.name): getattr(op, f.name) for f in dataclasses.fields(op)}
