"""Weights of a checkpoint: floats, or integers in compressed-tensors format.

int-quantized stores `weight` int8 [n, k]; pack-quantized stores `weight_packed` int32
[n, ceil(k bits / 32)], least significant first, each value plus 2^(bits - 1). Both have
`weight_scale` [n, groups]; static activations have `input_scale` and `input_zero_point`.
Source: compressed-tensors, `compressors/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import GraphError
from . import storage
from .checkpoint import Checkpoint
from .graph import Activation
from .schemes import Scheme, Schemes


@dataclass(frozen=True)
class Weight:
    """A matrix [n, k] as the graph stores it: f32, f16 or int8 `values` and what integers need."""

    values: NDArray[Any]
    mask: NDArray[np.bool_] | None
    scales: NDArray[np.float32] | None = None
    bits: Literal[4, 8] = 8
    group: int = 0
    activation: Activation | None = None
    input_scale: float | None = None
    input_zero_point: int = 0


class Weights:
    """Reads weights by module name, a Linear's as the checkpoint's quantization config says."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.schemes = Schemes(checkpoint.config)

    def exists(self, module: str) -> bool:
        names = (f"{module}.weight", f"{module}.weight_packed")
        return any(name in self.checkpoint.files for name in names)

    def is_quantized(self, module: str) -> bool:
        """Whether the checkpoint stores integers for this module."""
        files, name = self.checkpoint.files, f"{module}.weight"
        if name in files and self.checkpoint.dtype(name) == "I8":
            return True
        return f"{name}_packed" in files

    def read(self, module: str, kind: str = "Linear") -> Weight:
        """The weight of a module of class `kind`; GraphError unless config and tensors agree."""
        scheme = self.schemes.of(module, kind)
        if self.is_quantized(module):
            if scheme is None:
                self._fail(module, "is stored as integers, but quantization_config leaves it out")
            return self._integers(module, scheme)
        if scheme is not None or f"{module}.weight_scale" in self.checkpoint.files:
            self._fail(
                module,
                "is quantized by quantization_config but stored in floating point; "
                "save the checkpoint compressed, or list the layer in `ignore`",
            )
        name = f"{module}.weight"
        half = name in self.checkpoint.files and self.checkpoint.dtype(name) == "F16"
        values = self.checkpoint.raw(name) if half else self.checkpoint.float32(name)
        self._check_shape(module, values)
        return Weight(values, self.checkpoint.mask(name, values.shape))

    def _integers(self, module: str, scheme: Scheme) -> Weight:
        name = f"{module}.weight"
        packed = f"{name}_packed" in self.checkpoint.files
        values = self._unpacked(module, scheme.bits) if packed else self.checkpoint.raw(name)
        self._check_shape(module, values)
        self._check_symmetric(module, values.shape[1], scheme)
        return Weight(
            values=values,
            mask=self.checkpoint.mask(name, values.shape),
            scales=self._scales(module, values.shape, scheme.group),
            bits=scheme.bits,
            group=scheme.group,
            activation=scheme.activation,
            **self._static_input(module, scheme),
        )

    def _unpacked(self, module: str, bits: int) -> NDArray[np.int8]:
        shape = self.checkpoint.raw(f"{module}.weight_shape")
        packed = self.checkpoint.raw(f"{module}.weight_packed")
        n, k = (int(size) for size in shape) if shape.shape == (2,) else (0, 0)
        if packed.dtype != np.int32 or packed.shape != (n, -(-k * bits // 32)) or k < 1:
            self._fail(module, f"has weight_packed {list(packed.shape)} for weights {[n, k]}")
        data = np.ascontiguousarray(packed).view(np.uint8)
        if bits == 8:
            flipped: NDArray[np.uint8] = data[:, :k] ^ np.uint8(0x80)
            return flipped.view(np.int8)
        return storage.unpack_int4(data ^ np.uint8(0x88), k)

    def _check_shape(self, module: str, values: NDArray[Any]) -> None:
        if values.ndim != 2 or 0 in values.shape:
            self._fail(module, f"has a weight of shape {list(values.shape)}, not a matrix")

    def _check_symmetric(self, module: str, k: int, scheme: Scheme) -> None:
        zero_point = f"{module}.weight_zero_point"
        if zero_point in self.checkpoint.files and self.checkpoint.raw(zero_point).any():
            self._fail(module, "has weight zero points; the engine runs symmetric weights only")
        order = f"{module}.weight_g_idx"
        if order in self.checkpoint.files:
            expected = np.arange(k) // (scheme.group or k)
            if not np.array_equal(self.checkpoint.raw(order), expected):
                self._fail(
                    module,
                    "has groups in activation order (weight_g_idx), which the engine does not run; "
                    "quantize it with `actorder: static` or without",
                )

    def _scales(self, module: str, shape: tuple[int, ...], group: int) -> NDArray[np.float32]:
        """f32 [n, groups]; a scale per tensor is repeated for every row."""
        n, k = shape
        groups = -(-k // group) if group else 1
        stored = self.checkpoint.float32(f"{module}.weight_scale")
        if stored.size == n * groups:
            return stored.reshape(n, groups)
        if stored.size != 1 or group:
            self._fail(module, f"has {stored.size} scales for weights {[n, k]}, group {group}")
        return np.full((n, 1), stored.reshape(-1)[0], np.float32)

    def _static_input(self, module: str, scheme: Scheme) -> dict[str, Any]:
        if scheme.activation.dynamic is not False:
            return {}
        scale = self.checkpoint.float32(f"{module}.input_scale")
        zero_point = np.zeros(1, np.int32)
        if f"{module}.input_zero_point" in self.checkpoint.files:
            zero_point = self.checkpoint.raw(f"{module}.input_zero_point").reshape(-1)
        if scale.size != 1 or zero_point.size != 1:
            self._fail(module, "has more than one input scale or zero point")
        return {"input_scale": float(scale.flat[0]), "input_zero_point": int(zero_point[0])}

    def _fail(self, module: str, what: str) -> NoReturn:
        raise GraphError(f"{self.checkpoint.folder}: {module} {what}")
