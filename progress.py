"""How long work reports how far it is, without knowing who draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with a label, units done and in total, and perhaps a short note (a layer's error)."""

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None: ...
