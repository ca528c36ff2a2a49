"""The `quantization_config` of a checkpoint: which layer is quantized how (compressed-tensors).

Source: compressed-tensors, `quantization/quant_config.py`, `quant_args.py` and `utils/match.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .graph import Activation
from .lowering.config import Config

GROUP_SIZES = (32, 64, 128)  # of weights that share a scale


@dataclass(frozen=True)
class Scheme:
    """How the layers of one config group are quantized; all weights are symmetric integers."""

    targets: tuple[str, ...]
    bits: Literal[4, 8]
    group: int
    activation: Activation


class Schemes:
    """Schemes by module name; none for a checkpoint that is not quantized."""

    def __init__(self, config: Config) -> None:
        """Raises GraphError for a quantization that the engine would not compute exactly."""
        self.ignore: tuple[str, ...] = ()
        self.schemes: list[Scheme] = []
        found = config.section("quantization_config") or config.section("compression_config")
        if found is None:
            return
        if found.value("quant_method", "compressed-tensors") != "compressed-tensors":
            found.refuse("quant_method", found.value("quant_method"), "compressed-tensors")
        for key in ("sparsity_config", "transform_config"):
            section = found.section(key)
            if section and section.values and section.value("format", "dense") != "dense":
                found.refuse(key, section.values, "no such transformation")
            if section and section.values.get("config_groups"):
                found.refuse(key, section.values, "no such transformation")
        self.ignore = _names(found, "ignore")
        groups = found.section("config_groups")
        for name in groups.values if groups else {}:
            group = groups.section(name) if groups else None
            if group is not None:
                self.schemes.append(_scheme(group))

    def of(self, module: str, kind: str) -> Scheme | None:
        """The scheme of a module of class `kind`; a name or pattern goes before a class."""
        if _matches(self.ignore, module, kind) is not None:
            return None
        found = [
            (rank, index)
            for index, scheme in enumerate(self.schemes)
            if (rank := _matches(scheme.targets, module, kind)) is not None
        ]
        return self.schemes[min(found)[1]] if found else None


def _matches(targets: tuple[str, ...], module: str, kind: str) -> int | None:
    """0 by exact name, 1 by pattern, 2 by class, None not at all."""
    ranks = []
    for target in targets:
        if target == module:
            ranks.append(0)
        elif target.startswith("re:") and re.match(target[3:], module):
            ranks.append(1)
        elif target == kind:
            ranks.append(2)
    return min(ranks, default=None)


def _names(config: Config, key: str) -> tuple[str, ...]:
    found = config.value(key, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        config.refuse(key, found, "a list of names")
    for name in found:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                config.refuse(key, name, f"a regular expression ({error})")
    return tuple(found)


def _scheme(group: Config) -> Scheme:
    weights = group.section("weights")
    if weights is None:
        group.refuse("weights", None, "weight arguments")
    if group.section("output_activations") is not None:
        group.refuse("output_activations", group.values["output_activations"], "null")
    _require(weights, "type", "int", ("int",))
    _require(weights, "symmetric", True, (True,))
    _require(weights, "dynamic", False, (False,))
    strategy = weights.value("strategy")
    _require(weights, "strategy", None, ("channel", "group", "tensor"))
    bits = weights.integer("num_bits", 8)
    if bits not in (4, 8):
        weights.refuse("num_bits", bits, "4 or 8")
    size = weights.integer("group_size") if strategy == "group" else 0
    if strategy == "group" and size not in GROUP_SIZES:
        weights.refuse("group_size", size, f"one of {', '.join(map(str, GROUP_SIZES))}")
    return Scheme(
        targets=_names(group, "targets"),
        bits=4 if bits == 4 else 8,
        group=size,
        activation=_activation(group.section("input_activations")),
    )


def _activation(inputs: Config | None) -> Activation:
    """Weight-only; int8 per token, dynamic; or int8 per tensor, static."""
    if inputs is None:
        return Activation(bits=16)
    _require(inputs, "num_bits", 8, (8,))
    _require(inputs, "type", "int", ("int",))
    dynamic = inputs.flag("dynamic", False)
    _require(inputs, "strategy", None, ("token",) if dynamic else ("tensor",))
    if dynamic:
        _require(inputs, "symmetric", True, (True,))
    return Activation(bits=8, dynamic=dynamic)


def _require(config: Config, key: str, default: object, allowed: tuple[object, ...]) -> None:
    found = config.value(key, default)
    if found not in allowed:
        config.refuse(key, found, " or ".join(map(repr, allowed)))
