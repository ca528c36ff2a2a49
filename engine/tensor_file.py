"""safetensors files, read without trust and written in a stream.

Own code, and not the safetensors library, because numpy has no bfloat16, because every fault must
be a `GraphError`, and because a model should not have to fit in memory to be written.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from .strict_json import REMAKE, parse

# numpy type of each safetensors dtype; bfloat16 is read as its bits (see `to_float32`).
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
# The library's own limit.
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its safetensors dtype, and its bytes counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file mapped into memory; `entries` is its verified table of contents."""

    def __init__(self, path: Path) -> None:
        """Raises GraphError unless the header is sound and the entries fill the file exactly."""
        self.path = path
        try:
            if (size := path.stat().st_size) < 8:
                raise GraphError(f"{path}: {size} bytes are no safetensors file; {REMAKE}")
            self._data = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise GraphError(f"{path}: can't be read ({error.strerror})") from None
        self.size = len(self._data)
        length = int.from_bytes(self._data[:8].tobytes(), "little")
        if length > min(LARGEST_HEADER, self.size - 8):
            raise GraphError(f"{path}: header of {length} bytes in {self.size}; {REMAKE}")
        header = parse(self._data[8 : 8 + length].tobytes(), f"{path}: header")
        self.entries = _entries(header, 8 + length, self.size, str(path))

    def array(self, name: str) -> NDArray[Any]:
        """Read-only view of a tensor (bfloat16 as its uint16 bits)."""
        entry = self.entries[name]
        data = self._data[entry.start : entry.stop]
        return np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape)

    def forget_pages(self) -> None:
        """Let go of the file's pages in memory; a later look at a tensor reads them back."""
        forget_pages([self._data])


def forget_pages(arrays: Iterable[NDArray[Any]]) -> None:
    """Let go of all pages in memory of the read-only mapped files that arrays lie in; a later look reads them back."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for mapping in {id(m): m for m in map(_mapping, arrays) if m}.values():
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: NDArray[Any]) -> mmap.mmap | None:
    """The read-only mapping that an array lies in, if any; a writeable one would lose its data."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return None
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _entries(header: Any, start: int, size: int, where: str) -> dict[str, Entry]:
    if not isinstance(header, dict):
        raise GraphError(f"{where}: the header is not a JSON object; {REMAKE}")
    header.pop("__metadata__", None)
    entries = {name: _entry(value, start, f"{where}: {name}") for name, value in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise GraphError(f"{where}: {name} starts at {entry.start}, not at {end}; {REMAKE}")
        end = entry.stop
    if end != size:
        raise GraphError(f"{where}: {size} bytes, but its tensors end at {end}; {REMAKE}")
    return entries


def _entry(value: Any, data_start: int, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise GraphError(f"{where}: a tensor needs dtype, shape and data_offsets; {REMAKE}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise GraphError(f"{where}: dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 2**53 for number in numbers
        ):
            raise GraphError(f"{where}: shape and data_offsets must list sizes; {REMAKE}")
    if len(shape) > 8 or len(offsets) != 2:
        raise GraphError(f"{where}: shape {shape}, data_offsets {offsets}; {REMAKE}")
    start, stop = offsets
    if stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise GraphError(f"{where}: {stop - start} bytes for {dtype} {shape}; {REMAKE}")
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def to_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """F32, F16, F64 or BF16 (as bits) as float32; bfloat16 and float16 convert exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


class TensorWriter:
    """Writes tensors one by one, holding none: `finish` joins the spools under a header.

    There is a spool per element size, and larger elements come first, so that every tensor is
    aligned. Use as a context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._stack = ExitStack()
        self._spools = {
            size: self._stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
            for size in (8, 4, 2, 1)
        }

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Append a tensor (a numpy type of `DTYPES`); returns the SHA-256 of its bytes."""
        dtype = NAMES[array.dtype.newbyteorder("<")]
        data = (
            np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            .reshape(-1)
            .view(np.uint8)
            .data
        )
        spool = self._spools[array.dtype.itemsize]
        self._entries[name] = (dtype, array.shape, array.dtype.itemsize, spool.tell())
        spool.write(data)
        return hashlib.sha256(data).hexdigest()

    def finish(self) -> int:
        """Write the file and flush it to the disk; returns its size in bytes."""
        bases, end = {}, 0
        for size, spool in self._spools.items():
            bases[size] = end
            end += spool.tell()
        header = {}
        for name, (dtype, shape, size, offset) in self._entries.items():
            start = bases[size] + offset
            stop = start + math.prod(shape) * size
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces, which the format allows, so that the data start at a multiple of a cache line.
        text += b" " * (-(8 + len(text)) % 64)
        with open(self.path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spool in self._spools.values():
                spool.seek(0)
                shutil.copyfileobj(spool, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
        return 8 + len(text) + end
