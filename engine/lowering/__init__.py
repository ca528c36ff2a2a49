"""From a Hugging Face config to ops: one short file per architecture.

To add one, write a function `Config -> Program` in a file here and name it in `ARCHITECTURES`. It must refuse every
config value that would change the numbers and that it does not lower: never silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import GraphError
from .config import Config
from .llama import lower_llama, lower_mistral
from .program import Program

__all__ = ["ARCHITECTURES", "Config", "Program", "lower"]

ARCHITECTURES: dict[str, Callable[[Config], Program]] = {
    "LlamaForCausalLM": lower_llama,
    "MistralForCausalLM": lower_mistral,
}


def lower(config: Config) -> Program:
    """The program of a model; GraphError for an architecture or value that is not known."""
    names = config.value("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise GraphError(
            f"{config.where}: architecture {name!r} is not known to the engine; it runs "
            + ", ".join(ARCHITECTURES)
        )
    return ARCHITECTURES[name](config)
