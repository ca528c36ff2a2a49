"""The engine decodes a graph on CPUs. Importing it never imports torch or transformers."""

from __future__ import annotations

from .batch import Batch, Event, Request
from .generation import Completion, Generation, Timings
from .runtime import Engine

__all__ = ["Batch", "Completion", "Engine", "Event", "Generation", "Request", "Timings"]
