"""Room on disk for calibration activations that would take too much memory."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch

THRESHOLD = 1 << 30  # bytes of hidden states in all streams of a walk, above which they go to disk


class Spill:
    """A file, mapped into memory, that tensors are moved to; it has no name and vanishes with them.

    Its pages count as resident once they are touched: `rest` lets go of them, the kernel writes them back.
    """

    def __init__(self, folder: Path | None, size: int) -> None:
        self.size = size
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._used = 0

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor in the file with the same values, on the CPU."""
        room = torch.frombuffer(
            self._map, dtype=values.dtype, count=values.numel(), offset=self._used
        )
        self._used += values.numel() * values.element_size()
        return room.reshape(values.shape).copy_(values)

    def rest(self) -> None:
        """Let go of all pages; a later look at a tensor reads them back."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
