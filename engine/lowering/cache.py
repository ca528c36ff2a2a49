"""Whether a checkpoint was calibrated for an int8 cache (compressed-tensors, `kv_cache_scheme`)."""

from __future__ import annotations

from .config import Config


def has_int8_cache(config: Config) -> bool:
    """Keys and values static, symmetric int8, per tensor or per head; GraphError for another kind."""
    quantization = config.section("quantization_config")
    scheme = quantization.section("kv_cache_scheme") if quantization else None
    if scheme is None:
        return False
    wanted = {
        "num_bits": (8,),
        "type": ("int",),
        "symmetric": (True,),
        "dynamic": (False,),
        "strategy": ("tensor", "attn_head"),
    }
    defaults = {"type": "int", "symmetric": True, "dynamic": False, "num_bits": 8}
    for key, allowed in wanted.items():
        found = scheme.value(key, defaults.get(key))
        if found not in allowed:
            scheme.refuse(key, found, " or ".join(map(repr, allowed)))
    return True
