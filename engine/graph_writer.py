"""Writing graph folders, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from . import storage
from .checkpoint import TOKENIZER
from .graph import (
    FORMAT,
    GRAPH_FILE,
    TENSOR_FILE,
    VERSION,
    Activation,
    FileInfo,
    Graph,
    Matrix,
    Model,
    Op,
    Part,
    Tensor,
    Tokenizer,
    Vector,
)
from .graph_check import check_graph, check_parts, fits
from .strict_json import digest, encode
from .tensor_file import TensorWriter

Array = NDArray[Any]


class GraphWriter:
    """Writes a graph folder tensor by tensor; only `finish` leaves anything behind.

    Use as a context manager. An older graph at the same place is replaced; another kind of folder
    is refused.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        if self.folder.exists() and (foreign := _foreign(self.folder)):
            raise GraphError(
                f"{self.folder}: has {foreign!r}, which is no part of a graph and would be lost; name a new folder"
            )
        self.tensors: dict[str, Tensor] = {}

    def __enter__(self) -> GraphWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(
                tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent)
            )
        except OSError as error:
            raise GraphError(f"{self.folder}: can't be written ({error.strerror})") from None
        self._writer = TensorWriter(self._temporary / TENSOR_FILE)
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def vector(self, name: str, values: Array) -> None:
        """Add a vector [n], stored as float32."""
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise GraphError(f"{name}: not all values are finite; the model is broken")
        self.tensors[name] = Vector(shape=values.shape, parts=self._store(name, {"values": values}))

    def matrix(
        self,
        name: str,
        values: Array,
        *,
        mask: Array | None = None,
        scales: Array | None = None,
        bits: Literal[4, 8] = 8,
        group: int = 0,
        activation: Activation | None = None,
        input_scale: float | None = None,
        input_zero_point: int = 0,
        dense: bool = False,
    ) -> None:
        """Add a weight [n, k]: float32, float16, or int8 values with `scales` [n, groups].

        `mask` [n, k] is True where pruning kept a weight (default: where it is not 0). It is
        stored, and the other weights left out, when that is smaller and `dense` does not forbid it.
        """
        quantized = values.dtype == np.int8
        if not quantized and values.dtype != np.float16:
            values = values.astype(np.float32, copy=False)
        code: Literal["f32", "f16", "i8", "i4"]
        code = ("i8" if bits == 8 else "i4") if quantized else _float_code(name, values)
        if code == "i4" and (values.min() < -8 or values.max() > 7):
            raise GraphError(f"{name}: weights outside -8..7 are no int4")
        if mask is None:
            mask = values != 0
        elif values[~mask].any():
            raise GraphError(f"{name}: the pruning mask drops weights that are not 0")
        bitmask = not dense and storage.bitmask_is_smaller(code, mask)
        kind: Literal["dense", "bitmask"] = "bitmask" if bitmask else "dense"
        parts = storage.pack(code, kind, values, mask)
        if scales is not None:
            parts["scales"] = scales.astype(np.float32)
        if activation is not None and activation.dynamic is False:
            parts["input_scale"] = np.array([input_scale], np.float32)
            parts["input_zero_point"] = np.array([input_zero_point], np.int32)
        matrix = Matrix(
            shape=(values.shape[0], values.shape[1]),
            dtype=code,
            storage=kind,
            group=group,
            nonzeros=int(mask.sum()),
            activation=activation,
            parts=self._store(name, parts),
        )
        for part, (_, shape) in matrix.layout().items():
            if part not in parts or not fits(parts[part].shape, shape):
                raise GraphError(f"{name}: {part} does not have the shape {list(shape)}")
        check_parts(name, matrix, parts)
        self.tensors[name] = matrix

    def _store(self, name: str, parts: dict[str, Array]) -> dict[str, Part]:
        try:
            return {
                part: Part(sha256=self._writer.add(f"{name}/{part}", array))
                for part, array in parts.items()
            }
        except OSError as error:
            raise GraphError(f"{self.folder}: can't be written ({error.strerror})") from None

    def finish(
        self,
        model: Model,
        ops: Sequence[Op],
        tokenizer: Tokenizer | None = None,
        tokenizer_bytes: bytes = b"",
        generation: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Check the graph, write graph.json and the tokenizer, rename the folder into place."""
        try:
            size = self._writer.finish()
            graph = Graph(
                model=model,
                tokenizer=tokenizer,
                generation=generation or {},
                provenance=provenance or {},
                files={TENSOR_FILE: FileInfo(bytes=size)},
                tensors=self.tensors,
                ops=tuple(ops),
            )
            check_graph(graph)
            if tokenizer is not None:
                _write_synced(self._temporary / tokenizer.file, tokenizer_bytes)
            _write_synced(self._temporary / GRAPH_FILE, graph_json(graph))
            _publish(self._temporary, self.folder)
        except OSError as error:
            raise GraphError(f"{self.folder}: can't be written ({error.strerror})") from None


def graph_json(graph: Graph) -> bytes:
    """The text of graph.json, with its checksum."""
    document = {"format": FORMAT, "version": VERSION, **encode(graph)}
    checksum = digest(document, GRAPH_FILE)
    document = {"format": FORMAT, "version": VERSION, "checksum": checksum, **document}
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def _float_code(name: str, values: Array) -> Literal["f32", "f16"]:
    if not np.isfinite(values).all():
        raise GraphError(f"{name}: not all weights are finite; the model is broken")
    return "f16" if values.dtype == np.float16 else "f32"


def _foreign(folder: Path) -> str | None:
    """A name in the folder that no graph has; everything in it is about to be replaced."""
    if not folder.is_dir():
        return folder.name
    names = {path.name for path in folder.iterdir()}
    own = {GRAPH_FILE, TENSOR_FILE, TOKENIZER} if GRAPH_FILE in names else set()
    return min(names - own, default=None)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; what was there goes only after that."""
    os.chmod(temporary, 0o755)
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old is not None:
            os.rename(old, final)
        raise
    for folder in (final, final.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
