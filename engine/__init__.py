"""The engine decodes a graph on CPUs. Importing it never imports torch or transformers."""

from __future__ import annotations

from .generation import Completion, Generation, Timings
from .runtime import Engine

__all__ = ["Completion", "Engine", "Generation", "Timings"]
