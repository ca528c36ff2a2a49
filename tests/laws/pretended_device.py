"""A device that isn't there, for tests: its tensors live in memory, but refuse to meet tensors of the CPU.

It borrows the name of PyTorch's `meta` device, the only one besides the CPU that every build knows. Operations run on
the CPU, so that results are those of the CPU to the bit, and an operation with one operand of each kind fails as it
would on a GPU: scalars, indices, `copy_` and conversions alone may cross.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")
CROSSING = {"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_"}


class Pretended(torch.Tensor):
    """A tensor that says it is on DEVICE; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        self.inner = inner
        return self

    def __repr__(self) -> str:
        return f"Pretended({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on DEVICE and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Pretended)]
    foreign = [t for t in tensors if not isinstance(t, Pretended) and t.ndim > 0]
    if there and foreign and name not in CROSSING:
        raise RuntimeError(f"{name}: a CPU tensor {list(foreign[0].shape)} meets one of {DEVICE}")
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"}
    elif name == "aten::copy_":
        result_there = isinstance(args[0], Pretended)
    else:
        result_there = bool(there)
    args, kwargs = tree_map(_inner, (args, kwargs))
    result = func(*args, **kwargs)
    known = {id(t.inner): t for t in there}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not result_there:
            return value
        operand = known.get(id(value))  # an operation in place returns it
        return Pretended(value) if operand is None else operand

    return tree_map(wrap, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value
