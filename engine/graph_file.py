"""Reading graph folders: every promise of the format is verified."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import GraphError
from .graph import (
    FORMAT,
    GRAPH_FILE,
    TENSOR_FILE,
    VERSION,
    Graph,
    Tokenizer,
)
from .graph_check import check_graph, check_parts, fault, fits
from .strict_json import REMAKE, decode, digest, parse
from .tensor_file import TensorFile

LARGEST_JSON = 256 * 2**20


def read_graph(folder: str | Path) -> Graph:
    """The graph in `folder` (or in its `graph` subfolder), with `arrays` mapped from the file.

    Everything is verified: JSON types and checksum, sizes, the safetensors header against
    graph.json, the SHA-256 of every part, mask populations and padding, finite scales, and that the
    ops form a program over the tensors. Any fault is a GraphError.
    """
    folder = find_graph(Path(folder))
    graph = _read_json(folder / GRAPH_FILE)
    check_graph(graph)
    if graph.files.keys() != {TENSOR_FILE}:
        fault(str(folder / GRAPH_FILE), f"files must name {TENSOR_FILE} and nothing else")
    file = TensorFile(folder / TENSOR_FILE)
    if file.size != graph.files[TENSOR_FILE].bytes:
        fault(str(file.path), f"{file.size} bytes, not {graph.files[TENSOR_FILE].bytes}")
    _check_entries(graph, file)
    if graph.tokenizer is not None:
        _check_tokenizer(folder, graph.tokenizer)
    arrays = {name: file.array(name) for name in file.entries}
    graph = dataclasses.replace(graph, arrays=arrays, folder=folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda name: _check_data(graph, name), graph.tensors))
    return graph


def _check_data(graph: Graph, name: str) -> None:
    tensor, parts = graph.tensors[name], graph.parts(name)
    for part, array in parts.items():
        found = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        if found != tensor.parts[part].sha256:
            fault(f"{TENSOR_FILE}: {name}/{part}", "the data do not match their SHA-256")
    check_parts(name, tensor, parts)


def find_graph(path: Path) -> Path:
    """The folder that holds graph.json: `path` itself or `path/graph`."""
    for folder in (path, path / "graph"):
        if (folder / GRAPH_FILE).is_file():
            return folder
    raise GraphError(
        f"{path}: no {GRAPH_FILE} here or in {path / 'graph'}; make one with `recipe export {path}`"
    )


def _read_json(path: Path) -> Graph:
    try:
        if path.stat().st_size > LARGEST_JSON:
            fault(str(path), f"more than {LARGEST_JSON} bytes")
        document = parse(path.read_bytes(), str(path))
    except OSError as error:
        raise GraphError(f"{path}: can't be read ({error.strerror})") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise GraphError(f"{path}: not a Paring graph; make one with `recipe export`")
    version = document.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise GraphError(
            f"{path}: graph version {version!r}, this Paring reads {VERSION}; export it again"
        )
    checksum = document.pop("checksum", None)
    if checksum != digest({**document, "format": FORMAT, "version": version}, str(path)):
        fault(str(path), "the content does not match its checksum")
    graph: Graph = decode(Graph, document, str(path))
    return graph


def _check_entries(graph: Graph, file: TensorFile) -> None:
    """The header lists exactly the parts that graph.json names, as their layouts say."""
    expected = {
        f"{name}/{part}": layout
        for name, tensor in graph.tensors.items()
        for part, layout in tensor.layout().items()
    }
    if differing := sorted(expected.keys() ^ file.entries.keys()):
        fault(str(file.path), f"{differing[0]!r} is in one of graph.json and the header only")
    for name, (dtype, shape) in expected.items():
        entry = file.entries[name]
        if entry.dtype != dtype or not fits(entry.shape, shape):
            fault(
                f"{file.path}: {name}",
                f"{entry.dtype} {list(entry.shape)} instead of {dtype} {list(shape)}",
            )


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    path = folder / tokenizer.file
    if path.parent != folder or not tokenizer.file or tokenizer.file in (".", ".."):
        fault(f"{folder / GRAPH_FILE}: tokenizer.file", f"{tokenizer.file!r} is no plain file name")
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise GraphError(f"{path}: can't be read ({error}); {REMAKE}") from None
    if found != tokenizer.sha256:
        fault(str(path), "the tokenizer does not match its SHA-256")
