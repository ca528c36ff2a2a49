"""Which weights of a matrix to keep, given a score for each: the base of every pattern, and their registry.

A pattern is a small class in a file of its own (`patterns/` has ours); defining it registers it, so a file given with
`--use` may bring another. Scorers (SparseGPT, Wanda, magnitude, ...) know no pattern: they call `mask`, or `chooser`
where they go through a matrix from left to right and change what they have not reached yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import AfterValidator

from ..errors import ModelError

NARROW = 32  # the widest windows that are sorted by a network

_registry: dict[str, type[MaskStructure]] = {}

Chooser: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
"""(first column, scores f32 [out, columns] of a window as they are now) -> bool [out, columns]."""


class MaskStructure(ABC):
    """A pattern, made from its text in a recipe. Subclass it, define `named` and `mask`."""

    usage: ClassVar[str]
    """How a recipe writes it, for messages."""
    local: ClassVar[bool] = False
    """True: any window of `columns` columns can be given its mask by itself."""

    rows: int = 1
    """The rows of a matrix must be a multiple of this."""
    columns: int = 1
    """Consecutive inputs that belong together; those of a matrix must be a multiple of this."""
    step: int | None = None
    """How many columns a chooser takes at a time; None: any multiple of `columns`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _registry[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @staticmethod
    def parse(text: str) -> MaskStructure:
        """The pattern that `text` means. Raises ValueError, saying what there is, when it is none."""
        found = [made for cls in _registry.values() if (made := cls.named(text)) is not None]
        if len(found) > 1:
            names = " and ".join(f"{type(made).__module__}" for made in found)
            raise ValueError(f"{text!r} is a mask structure of two modules, {names}; rename one")
        if not found:
            *most, last = sorted((cls.usage for cls in _registry.values()), key=len)
            most.sort(key=lambda usage: usage != "unstructured")
            raise ValueError(f"{text!r} is not a mask structure; use {', '.join(most)} or {last}")
        return found[0]

    @classmethod
    @abstractmethod
    def named(cls, text: str) -> MaskStructure | None:
        """The pattern if `text` is one of this kind, else None."""

    @abstractmethod
    def mask(self, scores: torch.Tensor, sparsity: float, *, per_row: bool = False) -> torch.Tensor:
        """Keep the weights that score highest, as far as the pattern allows.

        scores: f32 [out, in], what removing each weight costs, >= 0 and additive where a pattern adds them up; a
        negative score removes a weight before all others. Returns bool [out, in]. A fraction `sparsity` is removed, as
        exactly as the pattern can (of every row with `per_row`, where rows are free); among equals, those further left
        and up go first.
        """

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes, else None."""
        return None

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.text == getattr(other, "text", None)

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight [out, in] can be cut into this pattern."""
        return shape[0] % self.rows == 0 and shape[1] % self.columns == 0

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ModelError when a weight [out, in] can't be cut into this pattern."""
        if not self.divides(shape):
            raise ModelError(
                f"{name} is {shape[0]} x {shape[1]}, which {self.text} does not divide: it takes multiples of"
                f" {self.rows} x {self.columns}; put it in `ignore` or choose another mask_structure"
            )

    def chooser(self, scores: torch.Tensor, sparsity: float) -> Chooser:
        """For SparseGPT's column loop: a function that gives the mask of one window of columns after the other.

        Whatever spans columns must be settled by `scores` [out, in], those before the first column is pruned. A pattern
        that defines nothing has its whole mask settled by them; a local one looks at each window's scores of then.
        """
        if self.local:
            return lambda first, window: self.mask(window, sparsity)
        whole = self.mask(scores, sparsity)
        return lambda first, window: whole[:, first : first + window.shape[1]]


def structures_of(module: str) -> list[type[MaskStructure]]:
    """The mask structures that a Python module defines."""
    return [cls for cls in _registry.values() if cls.__module__ == module]


def keep_highest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """bool [rows, n]: exactly `removed` of each row are False, the lowest; of equals, the leftmost."""
    if removed <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if removed >= scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.shape[1] <= NARROW:
        columns = scores.T.contiguous()
        limit = sort_columns(columns)[removed - 1]
        return above(columns, limit, torch.full_like(limit, len(columns) - removed)).T
    limit = _highest_removed(scores, removed)
    kept = scores > limit
    surplus = scores.shape[1] - removed - kept.sum(dim=1)
    for row in surplus.nonzero().flatten().tolist():  # ties at the limit: the rightmost stay
        ties = (scores[row] == limit[row]).nonzero().flatten()
        kept[row, ties[len(ties) - int(surplus[row]) :]] = True
    return kept


def _highest_removed(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """The `removed`th lowest of each row [rows, n], as [rows, 1]."""
    if scores.device.type != "cpu":
        return scores.kthvalue(removed, dim=1, keepdim=True).values
    # numpy selects with vector instructions: some fifteen times as fast
    parts = np.partition(scores.detach().numpy(), removed - 1, axis=1)[:, removed - 1 : removed]
    return torch.from_numpy(np.ascontiguousarray(parts))


def sort_columns(columns: torch.Tensor) -> torch.Tensor:
    """[m, n] -> the same with every column in rising order.

    A bitonic network (Batcher 1968) of whole rows: for many narrow windows several times as fast as sorting each.
    """
    size = 1 << (len(columns) - 1).bit_length()
    rows = [torch.full_like(columns[0], -torch.inf)] * (size - len(columns)) + list(columns)
    width = 2
    while width <= size:
        distance = width // 2
        while distance > 0:
            for i in range(size):
                j = i ^ distance
                if j > i:
                    low = torch.minimum(rows[i], rows[j])
                    high = torch.maximum(rows[i], rows[j])
                    rows[i], rows[j] = (high, low) if i & width else (low, high)
            distance //= 2
        width *= 2
    return torch.stack(rows[size - len(columns) :])


def above(columns: torch.Tensor, limit: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool [m, n]: the `count` [n] highest of each column [m, n], those above its `limit` [n] and the last at it."""
    kept = columns > limit
    missing = count - kept.sum(dim=0)
    if bool(missing.any()):
        for i in reversed(range(len(columns))):
            taken = (columns[i] == limit) & (missing > 0)
            kept[i] |= taken
            missing = missing - taken.to(missing.dtype)
    return kept


def _known(text: str) -> str:
    MaskStructure.parse(text)
    return text


MaskStructureName = Annotated[str, AfterValidator(_known)]
"""The type of a recipe's `mask_structure`."""
