"""`unstructured`: any weight."""

from __future__ import annotations

import torch

from ..mask_structure import MaskStructure, keep_highest


class Unstructured(MaskStructure):
    """Any weight. Exactly round(sparsity * n) of the n weights are removed, or of each row's."""

    usage = "unstructured"
    local = True

    @classmethod
    def named(cls, text: str) -> Unstructured | None:
        return cls(text) if text == "unstructured" else None

    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        rows = scores if per_row else scores.reshape(1, -1)
        return keep_highest(rows, round(sparsity * rows.shape[1])).reshape(scores.shape)
