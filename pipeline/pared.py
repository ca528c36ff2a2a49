"""A model on its way through the stages of a recipe, with all that is kept besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modifiers import Masks
from ..modifiers.quantization.cache import CacheQuantization
from ..modifiers.quantization.layer import LayerQuantization, attach
from ..modifiers.sizes import sizes
from ..progress import Progress
from .checkpoint import read_masks
from .models import load_model, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Pared:
    """Model, tokenizer, held zeros, and the quantization of each layer and each attention's cache by module name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masks: Masks = field(default_factory=Masks)
    quantization: dict[str, LayerQuantization] = field(default_factory=dict)
    caches: dict[str, CacheQuantization] = field(default_factory=dict)

    @classmethod
    def load(cls, ref: str, progress: Progress | None = None) -> Pared:
        """The model `ref` in plain float, and the masks stored with it if it was pruned by Paring."""
        pared = cls(*load_model(ref, progress, dequantize=True))
        place = resolve_model(ref)
        if isinstance(place, Path):
            for name, mask in read_masks(place, pared.model).items():
                pared.masks.hold(name, mask)
        return pared

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; with the model's weights, all there is."""
        layers = {name: layer.state_dict() for name, layer in self.quantization.items()}
        return {
            "masks": self.masks.state_dict(),
            "quantization": layers,
            "caches": {name: cache.state_dict() for name, cache in self.caches.items()},
            "sizes": sizes(self.model),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back `state`; the model's weights must be those it was taken with."""
        self.masks.load_state_dict(state["masks"])
        for name, saved in state["quantization"].items():
            layer = LayerQuantization.from_state(self.model.get_submodule(name), saved)
            self.quantization[name] = layer
            attach(layer)
        for name, saved in state["caches"].items():
            self.caches[name] = CacheQuantization.from_state(self.model.get_submodule(name), saved)
            self.caches[name].attach()
