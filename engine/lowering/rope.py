"""Rope frequencies from a config, as `transformers` computes them (modeling_rope_utils.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import Config


def inverse_frequencies(config: Config, head_dim: int) -> NDArray[Any]:
    """f32 [head_dim / 2] for rope types default, linear and llama3; GraphError for any other.

    Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`.
    """
    if head_dim % 2:
        config.refuse("head_dim", head_dim, "an even number")
    scaling = config.section("rope_parameters") or config.section("rope_scaling")
    scaling = scaling or Config({}, config.where)
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    for source in (config, scaling):
        if source.value("partial_rotary_factor", 1.0) != 1.0:
            source.refuse("partial_rotary_factor", source.value("partial_rotary_factor"), "1.0")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies: NDArray[Any] = 1.0 / theta**exponents
    kind = scaling.value("rope_type", scaling.value("type", "default"))
    if kind == "linear":
        frequencies = frequencies / scaling.number("factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling, config)
    elif kind != "default":
        scaling.refuse("rope_type", kind, "default, linear or llama3")
    return frequencies.astype(np.float32)


def _llama3(frequencies: NDArray[Any], scaling: Config, config: Config) -> NDArray[Any]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if not low < high:
        scaling.refuse("high_freq_factor", high, f"more than low_freq_factor ({low})")
    length = "original_max_position_embeddings"
    # As in transformers: the config's own value goes before the section's.
    source = config if config.value(length, None) is not None else scaling
    original = source.integer(length, config.integer("max_position_embeddings"))
    wavelengths = 2 * math.pi / frequencies
    kept = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    ramp: NDArray[Any] = (1 - kept) * frequencies / factor + kept * frequencies
    return ramp
