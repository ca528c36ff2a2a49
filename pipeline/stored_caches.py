"""The int8 cache of a checkpoint, for versions of compressed-tensors that do not know the model's attention.

compressed-tensors 0.20 looks for an argument `past_key_values`, which transformers 5.24 calls `cache`: it then leaves
keys and values as they are, and the loaded model would not compute what was stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file

from ..modifiers.quantization.cache import CacheQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY, VALUE = ".k_scale", ".v_scale"


def round_caches(
    model: PreTrainedModel, place: Path | str, scheme: Mapping[str, Any] | None
) -> None:
    """Round keys and values of every attention that the folder or hub model `place` has int8 scales for.

    scheme: the `kv_cache_scheme` of its config. Attentions that compressed-tensors has taken care of are left alone,
    and so are caches of other types.
    """
    if not scheme or (scheme.get("type", "int"), scheme.get("num_bits", 8)) != ("int", 8):
        return
    scales = _scales(place)
    for name, key_scale in scales.items():
        if not name.endswith(KEY):
            continue
        attention = model.get_submodule(name.removesuffix(KEY))
        if not hasattr(attention, KEY[1:]):
            value_scale = scales[name.removesuffix(KEY) + VALUE]
            CacheQuantization(attention, key_scale, value_scale).attach()


def _scales(place: Path | str) -> dict[str, torch.Tensor]:
    """f32 [kv_heads] or [1], by name in the weight files."""
    if not isinstance(place, Path):  # the hub's folder in the cache, where the weights are by now
        place = Path(str(cached_file(place, "config.json"))).parent
    found = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith((KEY, VALUE)):
                    found[name] = tensors.get_tensor(name).float().reshape(-1)
    return found
