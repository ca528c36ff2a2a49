"""fp32 matrix products by the faster of the libraries that torch carries."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

MKLDNN: Any = torch.backends.mkldnn  # its attributes are untyped
EXACT = 4e-6  # relative error of a product in fp32; bf16 inputs make about 2e-3


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """fp32 products on the CPU go through oneDNN where that is still fp32: twice MKL's speed on an AMD CPU.

    torch asks oneDNN only when told that bf16 would do. CPUs with bf16 matrix tiles (AMX) then really use it, so a
    small product is tried first, once in a process, and there everything stays as it is. While it lasts, torch refuses
    `get_float32_matmul_precision`, which torch.compile asks; compile before or after.
    """
    matmul = MKLDNN.matmul
    before = matmul.fp32_precision
    if before != "bf16" and _onednn_is_exact():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.cache
def _onednn_is_exact() -> bool:
    if not MKLDNN.is_available():
        return False
    matmul = MKLDNN.matmul
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=generator)
    b = torch.randn(256, 256, generator=generator)
    expected = a.double() @ b.double()
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        product = a @ b
    finally:
        matmul.fp32_precision = before
    return float((product - expected).norm() / expected.norm()) < EXACT
