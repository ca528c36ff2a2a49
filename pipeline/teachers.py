"""Where the teachers of a run come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .models import load_model, model_fingerprint

if TYPE_CHECKING:
    from torch import nn

SELF = "self"


class Teachers:
    """A session's `load_teacher`: zoo stubs, Hugging Face ids and folders; `self` is the model the run began with.

    That one is read again from where it came, untouched by any stage: memory is spent on it only while it teaches.
    """

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(self, reference: str) -> nn.Module:
        """The model, in float32 and evaluation mode. Raises ModelError or ZooError."""
        return load_model(self._place(reference))[0]

    def fingerprint(self, reference: str) -> str:
        """Changes with the model's weights; found without loading them."""
        return model_fingerprint(self._place(reference))

    def _place(self, reference: str) -> str:
        return self.base if reference == SELF else reference
