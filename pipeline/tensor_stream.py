"""A safetensors file written tensor by tensor, the same to the byte as the library writes it.

The library wants all tensors in memory at once; here each is made when its turn comes, and forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# In the library's order: it sorts tensors by their type, the last first, then by name, so that all are aligned.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
RANK = {dtype: -number for number, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class Planned:
    """A tensor to come: what the header says of it, and how it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Planned:
        """A tensor that is there already, on any device."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(file: Path, tensors: Mapping[str, Planned]) -> None:
    """Write `tensors` by name, holding one at a time. ValueError when one is not made as it was planned."""
    ordered = sorted(tensors.items(), key=lambda item: (RANK[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # `transformers` asks for it
    end = 0
    for name, planned in ordered:
        start, end = end, end + planned.bytes
        dtype = DTYPES[planned.dtype]
        header[name] = {"dtype": dtype, "shape": planned.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, planned in ordered:
            stream.write(_bytes(name, planned))


def _bytes(name: str, planned: Planned) -> memoryview:
    tensor = planned.make().detach().cpu().contiguous()
    if tensor.dtype != planned.dtype or tensor.shape != planned.shape:
        raise ValueError(
            f"{name}: planned as {planned.dtype} {list(planned.shape)},"
            f" made as {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.reshape(-1).view(torch.uint8).numpy().data
